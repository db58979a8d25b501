"""Quantised checkpoints in each published form are read as the numbers that the form says, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.models import loading
from jax_moe_lora.models.params import leaf_name
from pallas_kernels.ops import Quantised, dequantise
from support import quantised_files as files
from support.checkpoints import load
from support.memory import traced
from support.quantised_cases import BLOCKS, CASES, RAW, draw, raw_for


def leaves(params: Any) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    return {".".join(map(leaf_name, path)): leaf for path, leaf in pairs}


@pytest.mark.parametrize("name", CASES)
def test_a_form_is_read_as_its_numbers(name: str, tmp_path: Path) -> None:
    case, raw = CASES[name], raw_for(name)
    quantised, wide = files.write(tmp_path, raw, draw(raw), case.settings, case.writer)
    found, expected = leaves(load(quantised)), leaves(load(wide))
    in_few_bits = {path for path, leaf in found.items() if isinstance(leaf, Quantised)}
    assert {path.rsplit(".", 1)[1] for path in in_few_bits} == {*"qkvo", "gate", "up", "down", "mlp_gate"} | {
        "mlp_up",
        "mlp_down",
    }
    for path, leaf in found.items():
        if path not in in_few_bits:
            assert (leaf == expected[path]).all()
            continue
        assert leaf.format.name == case.format
        assert leaf.shape == expected[path].shape
        np.testing.assert_allclose(dequantise(leaf, jnp.float32), expected[path], rtol=3e-7, atol=1e-30)


def test_pieces_are_read_like_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fp8", "int4 zero points", "awq", "gptq"):
        case = CASES[name]
        quantised, _ = files.write(tmp_path / name, RAW, draw(), case.settings, case.writer)
        whole = load(quantised)
        monkeypatch.setattr(loading, "PIECE_BYTES", 700)
        pieces = load(quantised)
        monkeypatch.undo()
        for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
            assert (one == other).all()


def test_a_head_may_be_quantised_and_modules_may_stay(tmp_path: Path) -> None:
    which = r"lm_head\.weight|.*experts.*\.weight"
    quantised, wide = files.write(tmp_path, RAW, draw(), BLOCKS, files.fp8_block, which)
    found, expected = load(quantised), load(wide)
    assert isinstance(found.head, Quantised)
    assert (dequantise(found.head, jnp.float32) == expected.head).all()
    assert (found.layers[0]["q"] == expected.layers[0]["q"]).all()


@pytest.mark.parametrize("name", ["fp8", "awq", "int4"])
def test_peak_memory_is_the_arrays_and_a_few_pieces(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = RAW | {"hidden_size": 256, "moe_intermediate_size": 1024, "num_hidden_layers": 1, "mlp_only_layers": []}
    case = CASES[name]
    quantised, _ = files.write(tmp_path, raw, draw(raw), case.settings, case.writer)
    monkeypatch.setattr(loading, "PIECE_BYTES", 2**15)
    load(quantised)  # what is imported and kept
    params, peak, _ = traced(lambda: load(quantised))
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert peak < arrays + 16 * 2**15 + 300_000, f"{peak} bytes at once for {arrays} of arrays"


Change = Callable[[dict[str, files.Tensor]], Any]
EXPERT = "model.layers.0.mlp.experts.1.up_proj"
SCALE, VALUES = f"{EXPERT}.weight_scale_inv", f"{EXPERT}.weight"


def put(name: str, dtype: str, array: np.ndarray) -> Change:
    return lambda tensors: tensors.update({name: (dtype, array)})


def edit(name: str, place: Any, value: Any) -> Change:
    def change(tensors: dict[str, files.Tensor]) -> None:
        tensors[name][1][place] = value

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put(SCALE, "F32", np.ones((2, 3), np.float32)), rf"{SCALE}.*shape \[2, 3\]; expected \[2, 2\]"),
        (put(SCALE, "F8_E4M3", np.ones((2, 2), np.uint8)), rf"{SCALE}.*dtype F8_E4M3; expected F32"),
        (put(VALUES, "F8_E4M3", np.ones((48, 32), np.uint8)), rf"{VALUES}.*shape \[48, 32\]; expected \[48, 64\]"),
        (put(VALUES, "F32", np.ones((48, 64), np.float32)), rf"{VALUES}.*dtype F32; expected F8_E4M3"),
        (edit(SCALE, (0, 1), np.nan), f"{SCALE} .*not finite"),
        (edit(SCALE, (0, 1), np.inf), f"{SCALE} .*not finite"),
        (edit(SCALE, (0, 1), 1e37), rf"{SCALE} .*a scale of 1e\+37.*not finite in float32"),
        (edit(VALUES, (3, 5), 0x7F), f"{VALUES} .*not finite"),
        (edit(VALUES, (3, 5), 0xFF), f"{VALUES} .*not finite"),
        (lambda tensors: tensors.pop(SCALE), f"{VALUES} .*dtype F8_E4M3"),
        (lambda tensors: tensors.pop(VALUES), rf"{SCALE}, and {VALUES} is missing"),
        (put("model.layers.0.mlp.odd_scale", "F32", np.ones(1, np.float32)), "no place for: .*odd_scale"),
    ],
)
def test_fp8_that_does_not_fit_is_refused_by_name(change: Change, named: str, tmp_path: Path) -> None:
    refused(tmp_path, "fp8", change, named)


def refused(folder: Path, name: str, change: Change, named: str) -> None:
    case, raw = CASES[name], raw_for(name)
    quantised, _ = files.write(folder, raw, draw(raw), case.settings, case.writer, change=change)
    with pytest.raises(CheckpointError, match=named):
        load(quantised)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("int4", put(f"{EXPERT}.weight_shape", "I64", np.array([48, 72])), r"weight_shape .*says \[48, 72\]"),
        ("int4", put(f"{EXPERT}.weight_packed", "I32", np.ones((48, 7), np.int32)), r"expected \[48, 8\]"),
        ("int4", put(f"{EXPERT}.weight_scale", "F16", np.ones((48, 9), np.float16)), r"weight_scale.*\[48, 9\]"),
        ("int4", put(f"{EXPERT}.weight_scale", "F16", np.ones((48, 4), np.float16)), r"\[48, 4\]; expected \[48, 8\]"),
        (
            "int4",
            put(f"{EXPERT}.weight_scale", "F16", np.ones((48, 0), np.float16)),
            r"weight_scale.*\[48, 0\]; expected \[48, 8\]",
        ),
        ("int4", edit(f"{EXPERT}.weight_scale", (0, 0), np.nan), "weight_scale .*not finite"),
        ("int4", put(f"{EXPERT}.weight", "F32", np.ones((48, 64), np.float32)), f"no place for: {EXPERT}.weight"),
        ("int4", lambda tensors: tensors.pop(f"{EXPERT}.weight_shape"), "weight_shape is missing"),
        (
            "int4 zero points",
            put(f"{EXPERT}.weight_zero_point", "I32", np.ones((5, 8), np.int32)),
            r"expected \[6, 8\]",
        ),
        ("int4", put(f"{EXPERT}.weight_g_idx", "I32", np.ones(64, np.int32)), "no place for: .*weight_g_idx"),
        ("nvfp4", put(f"{EXPERT}.weight_global_scale", "F32", np.zeros(1, np.float32)), "global_scale .*divides"),
        ("nvfp4", edit(f"{EXPERT}.weight_scale", (0, 0), 0x7F), "weight_scale .*not finite"),
        ("nvfp4", put(f"{EXPERT}.weight_global_scale", "F32", np.full(1, 1e-38, np.float32)), "not finite in float32"),
        ("nvfp4", put(f"{EXPERT}.weight_packed", "U8", np.ones((48, 30), np.uint8)), r"packed.*expected \[48, 32\]"),
        (
            "nvfp4",
            put(f"{EXPERT}.weight_global_scale", "F32", np.full(1, np.inf, np.float32)),
            "global_scale .*not finite",
        ),
        ("modelopt nvfp4", put(f"{EXPERT}.weight_scale_2", "F32", np.full((), np.nan, np.float32)), "_2 .*not finite"),
        ("mxfp4", put(f"{EXPERT}.weight_scale", "U8", np.ones((64, 1), np.uint8)), r"scale.*expected \[64, 2\]"),
        ("mxfp4", put(f"{EXPERT}.weight_packed", "U8", np.ones((64, 16), np.uint8)), r"packed.*expected \[64, 32\]"),
        ("mxfp4", edit(f"{EXPERT}.weight_scale", (0, 0), 255), "weight_scale .*not finite"),
        ("mxfp4", edit(f"{EXPERT}.weight_scale", (0, 0), 254), r"weight_scale .*a scale of 1.7e\+38"),
        (
            "fp8 channel",
            put(f"{EXPERT}.weight_scale", "F32", np.ones((), np.float32)),
            "weight_scale .*formats that differ",
        ),
        ("modelopt fp8", put(f"{EXPERT}.weight_scale", "F32", np.ones(3, np.float32)), r"weight_scale.*\[3\]"),
        ("awq", put(f"{EXPERT}.qzeros", "I32", np.ones((8, 5), np.int32)), r"qzeros.*expected \[8, 6\]"),
        ("awq", put(f"{EXPERT}.qweight", "I32", np.ones((64, 5), np.int32)), r"qweight.*expected \[64, 6\]"),
        ("awq", put(f"{EXPERT}.scales", "F16", np.ones((), np.float16)), r"scales.*shape \[\]"),
        ("awq", edit(f"{EXPERT}.scales", (0, 0), np.nan), "scales .*not finite"),
        ("awq", lambda tensors: tensors.pop(f"{EXPERT}.qzeros"), "qzeros is missing"),
        ("gptq", put(f"{EXPERT}.g_idx", "I32", np.arange(64, dtype=np.int32)[::-1] // 8), "g_idx .*act-order"),
        (
            "gptq",
            put(f"{EXPERT}.g_idx", "I32", np.arange(64, dtype=np.int32) // 16),
            "g_idx .*than the 8 that have scales",
        ),
        ("gptq", put(f"{EXPERT}.qweight", "I32", np.ones((7, 48), np.int32)), r"qweight.*expected \[8, 48\]"),
        ("gptq", put(f"{EXPERT}.scales", "F16", np.ones((9, 48), np.float16)), r"scales.*expected \[8, 48\]"),
        ("gptq", put(f"{EXPERT}.qzeros", "I32", np.full((8, 6), -1, np.int32)), "zero points of 15"),
    ],
)
def test_other_forms_that_do_not_fit_are_refused_by_name(name: str, change: Change, named: str, tmp_path: Path) -> None:
    refused(tmp_path, name, change, named)


@pytest.mark.parametrize(
    ("name", "which", "dtype", "named"),
    [
        ("fp8", r"model\.embed_tokens\.weight", "float32", "embed_tokens.weight_scale_inv: an embedding is read in 16"),
        ("fp8", r".*_proj\.weight", "float16", "up_proj.weight_scale_inv .*not finite in float16"),
    ],
)
def test_what_a_model_cannot_run_is_refused_by_name(name: str, which: str, dtype: str, named: str, tmp_path) -> None:
    case = CASES[name]
    large = edit(SCALE, (0, 1), 200.0) if dtype == "float16" else lambda tensors: None
    quantised, _ = files.write(tmp_path, RAW, draw(), case.settings, case.writer, which, large)
    with pytest.raises(CheckpointError, match=named):
        load(quantised, dtype)


def test_a_module_that_the_config_calls_not_quantised_is_refused_where_it_is(tmp_path: Path) -> None:
    settings = BLOCKS | {"modules_to_not_convert": ["lm_head", EXPERT]}
    quantised, _ = files.write(tmp_path, RAW, draw(), settings, files.fp8_block)
    with pytest.raises(CheckpointError, match=f"{SCALE}, and the config says that {EXPERT} is not quantised"):
        load(quantised)


def test_experts_of_both_kinds_in_one_layer_are_refused(tmp_path: Path) -> None:
    which = r".*experts\.[12].*\.weight"
    quantised, _ = files.write(tmp_path, RAW, draw(), BLOCKS, files.fp8_block, which)
    with pytest.raises(CheckpointError, match=r"experts.0.\w+.weight in 16 bits and others"):
        load(quantised)
