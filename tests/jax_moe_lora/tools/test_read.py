"""`jax_moe_lora.read_adapter`: an adapter on the host for a folder, a config or a model."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jax_moe_lora
from jax_moe_lora import AdapterFormatError, AdapterNameError, InputError, Model, create_bank, read_adapter
from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.models.config_file import read_model_config
from support.checkpoints import write as write_checkpoint
from support.peft_files import pair, write_adapter

TENSORS = pair("0.mlp.experts.2.up_proj", 16, 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "sql", TENSORS, target_modules=["up_proj"])


def served(model: Path) -> Model:
    return Model(read_model_config(model), None, create_bank({"up": Site(8, 8, 1, (0,))}, 1, 1), model)


@pytest.mark.parametrize("kind", ["folder", "text", "config", "model"])
def test_an_adapter_is_read_for_a_folder_a_config_or_a_model(model, adapter, kind):
    given = {"folder": model, "text": str(model), "config": read_model_config(model)}.get(kind) or served(model)
    read = read_adapter(adapter, given)
    b, a = (TENSORS[key] for key in sorted(TENSORS, reverse=True))
    np.testing.assert_allclose(read.weights[0, "up"].delta(2), 2.0 * (b @ a), rtol=1e-6)
    assert (read.name, read.ranks, read.layout) == ("sql", {"up": (0, 2)}, "PEFT, per-expert matrices")
    assert read_adapter(adapter, given, name="mine").name == "mine"


def test_an_adapter_of_a_model_is_handed_out_by_its_name(model, adapter):
    holder = served(model)
    holder.register_adapter(adapter, "sql")
    np.testing.assert_array_equal(
        holder.adapter("sql").weights[0, "up"].b, read_adapter(adapter, model).weights[0, "up"].b
    )
    for name in ("other", None, 3):
        with pytest.raises(AdapterNameError):
            holder.adapter(name)


def test_what_is_no_model_or_no_adapter_is_refused(model, adapter):
    with pytest.raises(InputError, match="ModelConfig, or a Model"):
        read_adapter(adapter, {"model_type": "qwen3_moe"})
    with pytest.raises(AdapterFormatError, match="holds a model"):
        read_adapter(model, model)


def test_reading_an_adapter_imports_no_jax(model, adapter):
    reading = f"jax_moe_lora.read_adapter({str(adapter)!r}, {str(model)!r})"
    code = f"import sys, jax_moe_lora; {reading}; assert 'jax' not in sys.modules"
    root = str(Path(jax_moe_lora.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
