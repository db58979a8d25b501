"""Files that PEFT writes: with copies of the embeddings, and with targets that no module is called."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_moe_lora import AdapterFormatError, read_adapter
from support.networks import EXPERTS, load_peft, save_model, save_random_adapter, tiny
from support.peft_files import CONFIG, WEIGHTS

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tiny("qwen3_moe"), tmp_path_factory.mktemp("base") / "model")


def test_pefts_own_copies_of_the_embeddings_are_passed_over_until_one_is_trained(base, tmp_path):
    plain = save_random_adapter(base, tmp_path / "plain", r=4, target_modules=["q_proj"], target_parameters=EXPERTS)
    wrapped = load_peft(base, plain)
    wrapped.save_pretrained(tmp_path / "copies", save_embedding_layers=True)
    copies = {key for key in load_file(tmp_path / "copies" / WEIGHTS) if "lora" not in key}
    assert {key.split(".")[-2] for key in copies} == {"embed_tokens", "lm_head"}
    expected, read = read_adapter(plain, base), read_adapter(tmp_path / "copies", base)
    assert expected.weights.keys() == read.weights.keys()
    for key, weights in expected.weights.items():
        np.testing.assert_array_equal(read.weights[key].b, weights.b)
    wrapped.get_input_embeddings().weight.data[3, 2] += 1
    wrapped.save_pretrained(tmp_path / "trained", save_embedding_layers=True)
    with pytest.raises(AdapterFormatError, match=r"embed_tokens\.weight differs from .* in row 3 first"):
        read_adapter(tmp_path / "trained", base)


def test_peft_adapts_the_same_modules_whether_or_not_its_list_names_what_no_module_is_called(base, tmp_path):
    """Names that this model has no modules for; PEFT passes over them, and so does reading."""
    folder = save_random_adapter(base, tmp_path / "adapter", r=4, target_modules=["q_proj"], target_parameters=EXPERTS)
    few, keys = read_adapter(folder, base), adapted(base, folder)
    config = json.loads((folder / CONFIG).read_text())
    config["target_modules"] += ["w1", "w2", "w3", "fc1"]
    (folder / CONFIG).write_text(json.dumps(config))
    assert adapted(base, folder) == keys
    assert read_adapter(folder, base).weights.keys() == few.weights.keys()


def adapted(base: Path, folder: Path) -> set[str]:
    """The names of the matrices that PEFT makes for an adapter's config."""
    return {name for name, _ in load_peft(base, folder).named_parameters() if "lora_" in name}
