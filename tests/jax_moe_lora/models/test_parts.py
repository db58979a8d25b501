"""Of arrays that are split over devices, each part of a file is read once, and nothing beside it."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_io import TensorFile, open_tensors
from jax_moe_lora.models import checkpoint_tensors
from jax_moe_lora.models.checkpoint_tensors import Part
from support.checkpoints import write
from support.meshes import run_on_devices


def test_arrays_split_over_devices_hold_the_same_and_are_read_once(tmp_path: Path) -> None:
    written = sum(tensor.nbytes for tensor in write(tmp_path, num_experts=4).values())
    each = {"same": True, "split": True, "read": written}
    (report,) = run_on_devices(4, "read_parts", str(tmp_path))
    assert report == {"whole": written, "rows": each, "columns": each, "short_columns": each}


@pytest.mark.parametrize("page_bytes", [1, 4096])
@pytest.mark.parametrize("piece_bytes", [1, 300, 10_000])
@pytest.mark.parametrize("form", ["plain", "transposed", "every other row", "every other column, transposed"])
def test_a_box_of_a_matrix_is_read_alone(tmp_path: Path, monkeypatch, form: str, piece_bytes: int, page_bytes: int):
    stored = np.random.default_rng(0).standard_normal((3, 24, 20)).astype(np.float32)
    save_file({"stack": stored}, tmp_path / "one.safetensors")
    step, transposed = (2 if "other" in form else 1), "transposed" in form
    part = Part("stack", 1, first_row=2, transposed=transposed, step=step)
    matrix = part.view(stored, 8)
    target = np.zeros((4, matrix.shape[1] // 2), np.float32)
    read: list[int] = []
    fill = TensorFile._fill
    monkeypatch.setattr(TensorFile, "_fill", lambda *a: (read.append(len(a[1])), fill(*a))[1])
    monkeypatch.setattr(checkpoint_tensors, "PAGE_BYTES", page_bytes)
    with open_tensors(tmp_path / "one.safetensors", CheckpointError) as file:
        for rows, values in part.at(3, 1).pieces(file, target, piece_bytes):
            rows[...] = values
    np.testing.assert_array_equal(target, matrix[3:7, 1 : 1 + target.shape[1]])
    if page_bytes == 1:
        spanned = target.nbytes if not transposed else target.shape[1] * (3 * step + 1) * 4
        assert sum(read) == spanned
    else:
        assert sum(read) > target.nbytes
