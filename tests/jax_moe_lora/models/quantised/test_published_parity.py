"""Quantised checkpoints have the logits that transformers has for the same numbers in float32."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_moe_lora import Model
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.errors import CheckpointError, InputError
from jax_moe_lora.tools.merge import merge_adapter
from pallas_kernels.ops import Quantised
from support import quantised_files as files
from support.layers import assert_close
from support.networks import EXPERTS, peft_logits, save_model, save_random_adapter, tiny

pytestmark = pytest.mark.parity
LIMIT = 1e-5
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
# Each module of these names is quantised in what DeepSeek publishes; the router is not.
LINEAR = r".*_proj(_with_mqa)?\.weight"


@dataclass(frozen=True)
class Case:
    """A tiny model, and how it is quantised."""

    model_type: str
    write: Callable[..., tuple[Path, Path]]
    config: dict[str, Any] = field(default_factory=dict)


def fp8(folder: Path, config: Any, tensors: Any) -> tuple[Path, Path]:
    return files.write(folder, config, tensors, BLOCKS, files.fp8_block, LINEAR)


def int4(folder: Path, config: Any, tensors: Any) -> tuple[Path, Path]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*self_attn.*"],
    }
    return files.write(folder, config, tensors, settings, files.int4_packed, r".*experts\.\d.*\.weight")


CASES = {
    "deepseek_v3 fp8": Case("deepseek_v3", fp8, {"num_hidden_layers": 1, "first_k_dense_replace": 0}),
    "gpt_oss mxfp4": Case("gpt_oss", files.write_gpt_oss, {"num_hidden_layers": 1, "intermediate_size": 32}),
}


def source(folder: Path, case: Case) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The config and tensors of a random model, as transformers saves them."""
    base = save_model(tiny(case.model_type, **case.config), folder / "source", max_shard_size="1GB")
    return json.loads((base / "config.json").read_text()), load_file(base / "model.safetensors")


@pytest.mark.slow(40)
@pytest.mark.parametrize("name", CASES)
def test_logits_with_an_adapter_beside_the_base_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    quantised, wide = case.write(tmp_path, *source(tmp_path, case))
    adapter = save_random_adapter(wide, tmp_path / "adapter", r=3, target_parameters=EXPERTS, target_modules=["o_proj"])
    model = Model.from_pretrained(quantised, dtype="float32", max_adapters=2, max_rank=16)
    assert any(isinstance(leaf, Quantised) for leaf in model.params.layers[0].values())
    model.load_adapter(adapter, adapter_name="own")
    tokens = np.random.default_rng(0).integers(0, 99, (2, 20))
    logits = np.asarray(model.logits(tokens, [None, "own"]))
    assert_close(logits[:1], peft_logits(wide, None, tokens[:1]), LIMIT)
    assert_close(logits[1:], peft_logits(wide, adapter, tokens[1:]), LIMIT)
    fn = model.functional(batch=2, max_length=20)
    lengths, slots = jnp.full(2, 19), model.slots([None, "own"])
    cache, _ = jax.jit(fn.prefill)(fn.params, fn.bank, fn.init_cache(), jnp.asarray(tokens[:, :19]), lengths, slots)
    _, last = jax.jit(fn.decode)(fn.params, fn.bank, cache, jnp.asarray(tokens[:, 19]), slots)
    assert_close(np.asarray(last), logits[:, -1], LIMIT)
    with pytest.raises(CheckpointError, match=r"is quantised .*merging needs the 16-bit checkpoint.*--requantise"):
        merge_adapter(LoRAAdapter("own", {}), quantised, tmp_path / "merged")


def fp8_stacks(folder: Path, config: Any, tensors: Any) -> tuple[Path, Path]:
    return files.write_fp8_stacks(folder, config, tensors, weight_block_size=[32, 32])


@pytest.mark.slow(10)
@pytest.mark.parametrize("write", [int4, fp8_stacks])
def test_logits_without_adapters_are_those_of_transformers(write: Any, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "moe_intermediate_size": 32}
    quantised, wide = write(tmp_path, *source(tmp_path, Case("qwen3_moe", write, sizes)))
    model = Model.from_pretrained(quantised, dtype="float32", max_adapters=1, adapter_memory=2**20)
    tokens = np.random.default_rng(0).integers(0, 99, (2, 20))
    assert_close(np.asarray(model.logits(tokens)), peft_logits(wide, None, tokens), LIMIT)


DOWN = "model.layers.0.mlp.experts.down_proj"


def scale(value: int) -> Callable[[dict[str, files.Tensor]], Any]:
    return lambda tensors: tensors[f"{DOWN}_scales"][1].__setitem__((0, 0, 0), value)


def put(suffix: str, *shape: int) -> Callable[[dict[str, files.Tensor]], Any]:
    return lambda tensors: tensors.update({f"{DOWN}_{suffix}": ("U8", np.ones(shape, np.uint8))})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (scale(255), f"{DOWN}_scales .*not finite"),
        (scale(254), f"{DOWN}_scales .*not finite in float32"),
        (lambda tensors: tensors.pop(f"{DOWN}_scales"), f"{DOWN}_scales is missing"),
        (put("scales", 8, 64, 2), rf"{DOWN}_scales .*\[8, 64, 2\]; expected \[8, 64, 1\]"),
        (put("blocks", 8, 64, 1, 8), rf"{DOWN}_blocks .*\[8, 64, 1, 8\]"),
    ],
)
def test_mxfp4_that_does_not_fit_is_refused_by_name(change: Any, named: str, tmp_path: Path) -> None:
    quantised, _ = files.write_gpt_oss(tmp_path, *source(tmp_path, CASES["gpt_oss mxfp4"]), change=change)
    with pytest.raises(CheckpointError, match=named):
        Model.from_pretrained(quantised, dtype="float32", max_adapters=1, adapter_memory=2**20)


@pytest.mark.slow
def test_kernels_without_a_format_are_refused_when_the_model_is_loaded(tmp_path: Path, monkeypatch: Any) -> None:
    from pallas_kernels import backend

    case = Case("qwen3_moe", fp8, {"num_hidden_layers": 1, "moe_intermediate_size": 64})
    quantised, _ = case.write(tmp_path, *source(tmp_path, case))
    monkeypatch.setattr(backend, "device_capability", lambda: ((9, 0), "compute capability 9.0"))
    with pytest.raises(InputError, match=r"hopper.*packed for it, these are fp8_block in rows"):
        Model.from_pretrained(quantised, max_adapters=1, implementation="hopper")
