"""Quantised experts in stacks, as transformers 5 writes them, are read as their numbers, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.models import loading
from pallas_kernels.ops import Quantised, dequantise
from support import quantised_files as files
from support.checkpoints import TINY, expected_shapes, load

ONE_LAYER = TINY | {"num_hidden_layers": 1, "mlp_only_layers": [], "hidden_size": 64}
E = TINY["num_experts"]
GATE_UP, DOWN = (f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
SCALES = f"{GATE_UP}_scale_inv"
BLOCKS = {"weight_block_size": [32, 32]}


def draw(width: int, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    raw = ONE_LAYER | {"moe_intermediate_size": width} | changes
    rng = np.random.default_rng(0)
    return raw, {name: rng.standard_normal(shape, np.float32) for name, shape in expected_shapes(raw).items()}


def same_numbers(quantised: Path, wide: Path, format: str) -> None:
    found, expected = load(quantised).layers[0], load(wide).layers[0]
    for name in ("gate", "up", "down"):
        assert isinstance(found[name], Quantised)
        assert found[name].format.name == format
        assert (dequantise(found[name], jnp.float32) == expected[name]).all()
    assert (found["q"] == expected["q"]).all()


def halves(rows: int, columns: int, joined: int) -> tuple[int, int]:
    return rows // joined, columns


def whole(rows: int, columns: int, joined: int) -> tuple[int, int]:
    return rows, columns


def each_row(rows: int, columns: int, joined: int) -> tuple[int, int]:
    return 1, columns


def static(tensors: dict[str, files.Tensor]) -> None:
    """As Mistral 4 has them; rows stay in 16 bits here."""
    tensors |= {f"{name}_activation_scale": ("F32", np.ones(E, np.float32)) for name in (GATE_UP, DOWN)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [96, 32])  # gate and up of the latter are square together
def test_fp8_in_blocks_is_read_as_its_numbers(width: int, transposed: bool, tmp_path: Path) -> None:
    same_numbers(*files.write_fp8_stacks(tmp_path, *draw(width), transposed=transposed, **BLOCKS), "fp8_block")


@pytest.mark.parametrize(
    ("blocks", "shape", "format"),
    [
        (halves, lambda scales: scales, "fp8_tensor"),  # [E, 2, 1], as transformers allocates them
        (whole, lambda scales: scales, "fp8_tensor"),  # [E, 1, 1]
        (whole, lambda scales: scales[:, 0, 0], "fp8_tensor"),
        (each_row, lambda scales: scales, "fp8_channel"),
    ],
)
def test_fp8_with_few_scales_is_read_as_its_numbers(blocks: Any, shape: Any, format: str, tmp_path: Path) -> None:
    written = files.write_fp8_stacks(tmp_path, *draw(48), blocks=blocks, shape=shape, change=static)
    same_numbers(*written, format)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_scale_may_be_that_of_all_experts(shape: tuple[int, ...], tmp_path: Path) -> None:
    def one(tensors: dict[str, files.Tensor]) -> None:
        tensors |= {f"{name}_scale_inv": ("F32", np.full(shape, 0.25, np.float32)) for name in (GATE_UP, DOWN)}

    quantised, _ = files.write_fp8_stacks(tmp_path, *draw(48), blocks=whole, change=one)
    assert (load(quantised).layers[0]["up"].scales == 0.25).all()


def test_matrices_within_one_block_have_a_scale_each(tmp_path: Path) -> None:
    """transformers keeps two rows of scales for gate and up that lie in one block together."""
    written = files.write_fp8_stacks(tmp_path, *draw(48), blocks=halves, weight_block_size=[128, 128])
    same_numbers(*written, "fp8_block")


def test_mxfp4_of_a_family_that_has_gate_before_up_is_read_as_its_numbers(tmp_path: Path) -> None:
    same_numbers(*files.write_mxfp4_stacks(tmp_path, *draw(96)), "mxfp4")


def test_stacks_are_read_in_pieces_like_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PIECE_BYTES", 700)
    for transposed in (False, True):
        folder = tmp_path / str(transposed)
        same_numbers(*files.write_fp8_stacks(folder, *draw(96), transposed=transposed, **BLOCKS), "fp8_block")


def put(name: str, dtype: str, *shape: int) -> Callable[[dict[str, files.Tensor]], Any]:
    kind = np.float32 if dtype == "F32" else np.uint8
    return lambda tensors: tensors.update({name: (dtype, np.ones(shape, kind))})


def edit(name: str, place: Any, value: Any) -> Callable[[dict[str, files.Tensor]], Any]:
    return lambda tensors: tensors[name][1].__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put(SCALES, "F32", E, 5, 2), rf"{SCALES} .*\[3, 5, 2\]; expected \[3, 6, 2\]"),
        (put(SCALES, "F32", E), rf"{SCALES} .*\[3\]; expected \[3, 6, 2\]"),
        (put(SCALES, "F8_E8M0", E, 6, 2), f"{SCALES} .*dtype F8_E8M0"),
        (put(DOWN, "F32", E, 64, 96), f"{DOWN} .*dtype F32; expected F8_E4M3"),
        (put(DOWN, "F8_E4M3", E, 64, 64), rf"{DOWN} .*shape \[3, 64, 64\]"),
        (edit(f"{DOWN}_scale_inv", (1, 1, 1), np.nan), f"{DOWN}_scale_inv .*not finite"),
        (edit(f"{DOWN}_scale_inv", (1, 1, 1), 1e37), rf"{DOWN}_scale_inv .*a scale of 1e\+37.*not finite in float32"),
        (edit(DOWN, (1, 3, 5), 0x7F), f"{DOWN} .*not finite"),
        (lambda tensors: tensors.pop(DOWN), f"{DOWN}_scale_inv, and {DOWN} is missing"),
        (lambda tensors: tensors.pop(f"{DOWN}_scale_inv"), f"{DOWN} .*dtype F8_E4M3"),
        (put(f"{GATE_UP}_odd", "F32", 1), "no place for: .*_odd"),
    ],
)
def test_stacks_that_do_not_fit_are_refused_by_name(change: Any, named: str, tmp_path: Path) -> None:
    quantised, _ = files.write_fp8_stacks(tmp_path, *draw(96), change=change, **BLOCKS)
    with pytest.raises(CheckpointError, match=named):
        load(quantised)


def oblong(rows: int, columns: int, joined: int) -> tuple[int, int]:
    return 32, 16


def one_per_projection(tensors: dict[str, files.Tensor]) -> None:
    """Gate and up in a stack each, which are then square as down is."""
    for suffix in ("", "_scale_inv"):
        dtype, array = tensors.pop(f"{GATE_UP}{suffix}")
        for name, part in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
            tensors[f"{GATE_UP.removesuffix('gate_up_proj')}{name}_proj{suffix}"] = dtype, np.ascontiguousarray(part)


@pytest.mark.parametrize(
    ("sizes", "how", "named"),
    [
        ({"width": 48}, BLOCKS, f"{SCALES} .*blocks of 32 rows, which cut through gate and up of 48 rows"),
        (
            {"width": 96},
            {"blocks": oblong, "weight_block_size": [32, 16], "transposed": True},
            r"blocks of 32 x 16, and its matrices are stored as \[in, out\]",
        ),
        ({"width": 64}, BLOCKS | {"change": one_per_projection}, "square matrices, and so are all others"),
        ({"width": 96}, BLOCKS | {"modules_to_not_convert": [GATE_UP]}, f"says that {GATE_UP} is not quantised"),
    ],
)
def test_layouts_that_can_be_read_in_two_ways_are_refused(sizes: Any, how: Any, named: str, tmp_path: Path) -> None:
    quantised, _ = files.write_fp8_stacks(tmp_path, *draw(**sizes), **how)
    with pytest.raises(CheckpointError, match=named):
        load(quantised)
