"""A 16-bit checkpoint is quantised while it is read: each matrix as `quantise` says, in little memory."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_moe_lora import LoRAAdapter, Model, count_compilations
from jax_moe_lora.adapters.lora import uniform
from jax_moe_lora.errors import CheckpointError, InputError
from jax_moe_lora.models import loading
from jax_moe_lora.models.config_file import parse_model_config, read_model_config
from jax_moe_lora.models.families.examples import example
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.names import tensor_names
from jax_moe_lora.models.params import ModelParams, leaf_name
from jax_moe_lora.models.quantised.schemes import SCHEMES, quantised_formats
from pallas_kernels.ops import Quantised, quantise
from support.checkpoints import write
from support.memory import traced

SIZES = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "head_dim": 32} | {
    "num_key_value_heads": 4
}
ONE_LAYER = {"num_hidden_layers": 1, "mlp_only_layers": []}
IN_FEW_BITS = {*"qkvo", "gate", "up", "down", "mlp_gate", "mlp_up", "mlp_down"}


def load(folder: Path, scheme: str, dtype: str = "float32") -> ModelParams:
    config = read_model_config(folder)
    return load_params(folder, config, dtype, quantise=quantised_formats(config, scheme, folder))


def leaves(params: ModelParams) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    return {".".join(map(leaf_name, path)): leaf for path, leaf in pairs}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_matrix_is_what_quantise_makes_of_the_files_numbers(scheme: str, tmp_path: Path, monkeypatch) -> None:
    dtype = np.float32 if scheme == "int4" else ml_dtypes.bfloat16  # int4's scales have it
    changes = SIZES | ({"moe_intermediate_size": 160} if scheme == "fp8" else {})  # whose blocks end with the matrix
    tensors = write(tmp_path, dtype, **changes)
    monkeypatch.setattr(loading, "PIECE_BYTES", 2**15)  # several pieces a matrix
    found, names = leaves(load(tmp_path, scheme)), tensor_names(read_model_config(tmp_path))
    few = {path for path, leaf in found.items() if isinstance(leaf, Quantised)}
    assert {path.rsplit(".", 1)[1] for path in few} == IN_FEW_BITS
    exact = jax.jit(quantise, static_argnums=(1, 2))
    for path, leaf in found.items():
        source = names[path]
        array = tensors[source] if isinstance(source, str) else np.stack([tensors[name] for name in source])
        if path not in few:
            assert (np.asarray(leaf) == array).all()
            continue
        assert leaf.format.block[1] in (SCHEMES[scheme].block[1], 0)
        expected = exact(jnp.asarray(array, jnp.float32), leaf.format, jnp.dtype(dtype))
        assert jax.tree.structure(leaf) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(expected), strict=True):
            assert one.dtype == other.dtype
            assert (one == other).all()


def test_peak_memory_is_the_arrays_and_a_third_more_than_the_largest_tensor(tmp_path: Path, monkeypatch) -> None:
    sizes = SIZES | ONE_LAYER | {"hidden_size": 512, "moe_intermediate_size": 1024}
    tensors = write(tmp_path, ml_dtypes.bfloat16, **sizes)
    monkeypatch.setattr(loading, "PIECE_BYTES", 2**15)
    load(tmp_path, "int4")  # what is imported, compiled and kept
    params, peak, _ = traced(lambda: load(tmp_path, "int4"))
    arrays, largest = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), max(t.nbytes for t in tensors.values())
    assert peak < arrays + 1.3 * largest + 200_000, f"{peak} bytes at once for {arrays} of arrays and {largest}"


def test_published_gpt_oss_has_its_experts_alone_in_mxfp4() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32}
    config = parse_model_config({**example("gpt_oss"), **sizes})
    experts = {path.rsplit(".", 1)[1] for path in quantised_formats(config, "mxfp4", "gpt-oss")}
    assert experts == {"gate", "up", "down"}
    assert "layers.0.q" in quantised_formats(config, "fp8", "gpt-oss")


def test_what_cannot_be_quantised_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "narrow")
    with pytest.raises(InputError, match=r"quantise is 'fp3'; expected one of fp8, mxfp4"):
        Model.from_pretrained(tmp_path / "narrow", quantise="fp3")
    with pytest.raises(InputError, match=r"q of .*narrow has 16 columns, and mxfp4 takes multiples of 32"):
        Model.from_pretrained(tmp_path / "narrow", quantise="mxfp4")
    write(tmp_path / "few", quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    with pytest.raises(CheckpointError, match=r"few is quantised already \(fp8\)"):
        Model.from_pretrained(tmp_path / "few", quantise="fp8")


def test_numbers_that_rounding_makes_infinite_are_refused_by_name(tmp_path: Path) -> None:
    tensors = write(tmp_path, ml_dtypes.bfloat16, **SIZES)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    for value, named in ((np.inf, "not finite, which"), (60_000.0, "not finite in float16 once")):
        tensors[name][3, 5] = value
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{name} .*{named}"):
            load(tmp_path, "mxfp4", "float16")


@pytest.mark.slow
def test_adapters_come_and_go_over_quantised_weights_without_compiling(tmp_path: Path) -> None:
    write(tmp_path, ml_dtypes.bfloat16, **SIZES | ONE_LAYER)
    model = Model.from_pretrained(tmp_path, dtype="float32", quantise="mxfp4", max_adapters=2, max_rank=16)
    random = np.random.default_rng(0)

    def adapter(name: str) -> LoRAAdapter:
        a, b = random.standard_normal((3, 4, 128), np.float32), random.standard_normal((3, 128, 4), np.float32)
        return LoRAAdapter(name, {(0, "gate"): uniform(a, b, 0.5, 3)})

    tokens = random.integers(0, 32, (2, 8))
    answers = []
    for turn in range(3):
        with count_compilations() as count:
            model.load_adapter(adapter("own"), adapter_name="own")
            answers.append(np.asarray(model.logits(tokens, [None, "own"])))
            model.unload_adapter("own")
        assert turn == 0 or count.compilations == 0
    first, *others = answers
    for other in others:
        assert (other[0] == first[0]).all()
        assert (other[1] != first[1]).any()
