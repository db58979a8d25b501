"""A quantised copy of a checkpoint has the arrays of `quantise=`, in a form that others read."""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_moe_lora import LoRAAdapter, Model, merge_adapter, quantise_checkpoint, validate
from jax_moe_lora.adapters.lora import uniform
from jax_moe_lora.cli.main import main
from jax_moe_lora.errors import CheckpointError, InputError
from jax_moe_lora.inspect.folders import ModelSummary, inspect_folder
from jax_moe_lora.models.config_file import parse_model_config, read_model_config
from jax_moe_lora.models.families.examples import example
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.names import tensor_names
from jax_moe_lora.models.params import abstract_params, leaf_name
from jax_moe_lora.models.quantised.schemes import quantised_formats
from pallas_kernels.ops import Quantised, dequantise, quantise
from support.checkpoints import load, write
from support.layers import assert_close
from support.networks import save_model, tiny

SIZES: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64, "head_dim": 16} | {
    "num_key_value_heads": 4
}


def check_same(base: Path, written: Path, scheme: str) -> None:
    """The written checkpoint has the arrays that the base has with `quantise=`."""
    config = read_model_config(base)
    expected = load_params(base, config, "float32", quantise=quantised_formats(config, scheme, base))
    found = load(written)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert (one == other).all()


@pytest.mark.parametrize("scheme", ["fp8", "mxfp4", "int4"])
def test_a_quantised_copy_has_the_arrays_of_quantising_while_loading(scheme, tmp_path, monkeypatch, capsys) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    write(base, ml_dtypes.bfloat16, **SIZES)
    (base / "LICENSE").write_text("anyone may")
    words = ["quantise", str(base), str(out), "--format", scheme, "--max-shard-size", "20KB"]
    monkeypatch.setattr(sys, "argv", ["jax-moe-lora", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code in (0, None)
    assert f"out: {scheme}, " in capsys.readouterr().out
    check_same(base, out, scheme)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert (out / "LICENSE").read_text() == "anyone may"
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    ignored = settings.get("modules_to_not_convert", settings.get("ignore"))
    assert {"model.layers.0.mlp.gate", "lm_head"} <= {*ignored}


def test_what_has_no_published_form_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    write(tmp_path / "narrow")
    with pytest.raises(InputError, match=r"q of .*narrow has 16 columns, and int4 takes multiples of 32"):
        quantise_checkpoint(tmp_path / "narrow", tmp_path / "out", "int4")
    write(tmp_path / "few", quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})
    with pytest.raises(CheckpointError, match=r"few is quantised already \(fp8\)"):
        quantise_checkpoint(tmp_path / "few", tmp_path / "out", "fp8")
    tensors = write(tmp_path / "nan", **SIZES)
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    tensors[name][3, 5] = np.nan
    for file in (tmp_path / "nan").glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} .*not finite"):
        quantise_checkpoint(tmp_path / "nan", tmp_path / "out", "fp8")
    write(tmp_path / "good", **SIZES)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "good").iterdir())
    with pytest.raises(InputError, match="good is the folder that is read; give another one to write"):
        quantise_checkpoint(tmp_path / "good", tmp_path / "good", "fp8", force=True)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "good").iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few", "good", "nan", "narrow"]


def transformers_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Of a quantised checkpoint that transformers dequantises while it loads it."""
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    settings = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[method](dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


WIDE = {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 128, "num_key_value_heads": 4}


@pytest.mark.parity
@pytest.mark.slow(30)
@pytest.mark.parametrize(
    ("model_type", "scheme", "sizes"),
    [("qwen3_moe", "fp8", WIDE), ("gpt_oss", "mxfp4", {"intermediate_size": 32})],
)
def test_transformers_reads_a_quantised_copy_with_the_same_logits(model_type, scheme, sizes, tmp_path: Path) -> None:
    base = save_model(tiny(model_type, num_hidden_layers=1, **sizes).bfloat16(), tmp_path / "base")
    quantise_checkpoint(base, tmp_path / "out", scheme)
    check_same(base, tmp_path / "out", scheme)
    model = Model.from_pretrained(base, dtype="float32", quantise=scheme, max_adapters=1, adapter_memory=2**20)
    tokens = np.random.default_rng(0).integers(0, 99, (2, 20))
    assert_close(np.asarray(model.logits(tokens)), transformers_logits(tmp_path / "out", tokens), 1e-5)


def draw(folder: Path, model_type: str) -> None:
    """A random checkpoint in bfloat16; gpt-oss's experts stand in stacks `[E, in, out]`, gate and up by turns."""
    if model_type == "qwen3_moe":
        write(folder, ml_dtypes.bfloat16, **SIZES)
        return
    sizes = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    raw = {**example("gpt_oss"), **sizes, "layer_types": ["full_attention"]}
    config = parse_model_config(raw)
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_params(config, np.float32))
    shapes = {".".join(map(leaf_name, path)): leaf.shape for path, leaf in leaves}
    tensors = {name: shapes[path] for path, name in tensor_names(config).items() if isinstance(name, str)}
    experts, width, hidden = shapes["layers.0.gate"]
    at = "model.layers.0.mlp.experts"
    tensors |= {f"{at}.gate_up_proj": (experts, hidden, 2 * width), f"{at}.gate_up_proj_bias": (experts, 2 * width)}
    tensors |= {f"{at}.down_proj": (experts, width, hidden), f"{at}.down_proj_bias": (experts, hidden)}
    random = np.random.default_rng(1)
    drawn = {name: random.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in tensors.items()}
    folder.mkdir()
    save_file(drawn, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(("model_type", "scheme"), [("qwen3_moe", "fp8"), ("qwen3_moe", "int4"), ("gpt_oss", "mxfp4")])
def test_merging_into_a_quantised_base_rounds_the_sums_again_and_says_what_it_costs(
    model_type, scheme, tmp_path
) -> None:
    base, few, out = tmp_path / "base", tmp_path / "few", tmp_path / "out"
    draw(base, model_type)
    quantise_checkpoint(base, few, scheme)
    config = read_model_config(few)
    random = np.random.default_rng(0)
    experts, out_width, in_width = abstract_params(config, np.float32).layers[0]["gate"].shape
    weights = uniform(
        0.3 * random.standard_normal((1, 2, in_width), np.float32),
        0.3 * random.standard_normal((experts, out_width, 2), np.float32),
        0.5,
        experts,
    )
    weights.ranks[1:] = 0
    adapter = LoRAAdapter("mine", {(0, "gate"): weights})
    with pytest.raises(CheckpointError, match=r"few is quantised .*--requantise"):
        merge_adapter(adapter, few, out)
    with pytest.raises(InputError, match=r"base is in 16 bits"):
        merge_adapter(adapter, base, out, requantise=True)
    (row,) = merge_adapter(adapter, few, out, requantise=True)
    before, after = load(few), load(out)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    was, now = (np.asarray(dequantise(params.layers[0]["gate"], jnp.float32)) for params in (before, after))
    wanted = was[0] + weights.delta(0)
    gate = before.layers[0]["gate"]
    expected = quantise(jnp.asarray(wanted), gate.format, gate.scales.dtype)
    assert (now[0] == dequantise(expected, jnp.float32)).all()
    assert (now[1:] == was[1:]).all()
    error = np.linalg.norm(now[0] - wanted)
    assert (row.module, row.matrices) == ("gate", 1)
    np.testing.assert_allclose(row.error, error / np.linalg.norm(wanted), rtol=1e-3)
    np.testing.assert_allclose(row.of_update, error / np.linalg.norm(weights.delta(0)), rtol=1e-3)
    update = weights.delta(0)
    np.testing.assert_allclose(row.kept, np.vdot(now[0] - was[0], update) / np.vdot(update, update), rtol=1e-3)
    assert row.kept > (0.9 if scheme == "fp8" else 0.3)  # four bits round part of a small update away
    for one, other in zip(after.layers[0].items(), before.layers[0].items(), strict=True):
        same = [(a == b).all() for a, b in zip(*map(jax.tree.leaves, (one[1], other[1])), strict=True)]
        assert one[0] == "gate" or all(same)


def test_inspect_and_validate_know_formats_and_find_corrupt_scales(tmp_path: Path) -> None:
    for model_type, scheme, name, matrices in (("qwen3_moe", "int4", "int4", 20), ("gpt_oss", "mxfp4", "mxfp4", 12)):
        base, few = tmp_path / model_type, tmp_path / f"{model_type}-few"
        draw(base, model_type)
        quantise_checkpoint(base, few, scheme)
        summary, before = inspect_folder(few), inspect_folder(base)
        assert isinstance(summary, ModelSummary)
        assert isinstance(before, ModelSummary)
        assert summary.parameters == before.parameters
        assert before.formats == []
        (row,) = summary.formats
        assert (row.name, row.bits, row.matrices) == (name, 4, matrices)
        weights = [leaf for layer in load(few).layers for leaf in layer.values() if isinstance(leaf, Quantised)]
        extra = 16 * matrices if scheme == "int4" else 0  # `weight_shape`
        assert row.nbytes == extra + sum(weight.nbytes for weight in weights)
        adapter = tmp_path / "none"
        sound = [finding.message for finding in validate(adapter, few, deep=True)]
        assert not any("scale" in message for message in sound)
        broken = spoil(few)
        found = [finding.message for finding in validate(adapter, few, deep=True)]
        assert any(broken in message and "not finite" in message for message in found)
        assert [finding.message for finding in validate(adapter, few)] == sound


def spoil(folder: Path) -> str:
    """Makes a scale NaN (bfloat16's, or e8m0's); the tensor's name."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name.endswith(("weight_scale", "_scales")))
    begin = 8 + size + header[name]["data_offsets"][0]
    data[begin : begin + 2] = b"\xff\xff"
    file.write_bytes(data)
    return name
