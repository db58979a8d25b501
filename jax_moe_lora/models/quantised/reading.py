"""Quantised matrices, read some rows at a time into the arrays of a `Quantised`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.dtypes import DTYPES, QUANTISED_DTYPES
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.models.checkpoint_tensors import Part
from jax_moe_lora.models.quantised.forms import SCALES, FileTensor
from jax_moe_lora.models.quantised.packing import Disagreement
from jax_moe_lora.models.quantised.stored import StoredMatrix
from jax_moe_lora.models.quantised.values import finite, too_large
from pallas_kernels.quantised.array import Quantised

Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]
_STORED = DTYPES | QUANTISED_DTYPES


def read_quantised(
    stored: Sequence[StoredMatrix],
    files: Mapping[str, TensorFile],
    dtype: np.dtype,
    stacked: bool,
    allocate: Allocate,
    piece_bytes: int,
) -> Quantised:
    """One leaf of a model in host memory: a matrix, or those of all experts.

    Args:
      stored: where the matrices stand, all of one format.
      files: tensor -> its file.
      dtype: in which all numbers must be finite.
      stacked: whether the leaf has an axis of experts.
      allocate: makes an array.
      piece_bytes: what is read at a time.

    Raises:
      CheckpointError: values that are not finite or not supported, by name.
    """
    matrix = stored[0].matrix
    lead = (len(stored),) if stacked else ()
    arrays: dict[str, Any] = {
        name: allocate((*lead, *shape), kind) for name, (shape, kind) in _arrays(stored, files).items()
    }
    for index, one in enumerate(stored):
        targets = {name: array[index, ...] if stacked else array for name, array in arrays.items()}
        sizes = np.array([matrix.rows, matrix.columns, matrix.scales[1]])
        for tensor, part in one.parts:
            target = sizes if tensor.part == "check" else targets[tensor.part]
            _read(tensor, part, files[part.tensor], target, piece_bytes, one.form.stacked)
        _check_size(one, targets, dtype, files)
    return Quantised(format=matrix.format, **arrays)


def _arrays(
    stored: Sequence[StoredMatrix], files: Mapping[str, TensorFile]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The arrays of a matrix: shape and dtype."""
    matrix = stored[0].matrix
    values = (matrix.rows, matrix.columns // matrix.format.per_byte), np.dtype(np.uint8)
    kinds: set[np.dtype] = set()
    for one in stored:
        name = next(part.tensor for tensor, part in one.parts if tensor.part == "scales")
        kinds.add(_STORED[files[name].infos[name].dtype])
    kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
    arrays: dict[str, Any] = {"values": values, "scales": (matrix.scales, SCALES.get(matrix.format.codec, kind))}
    roles = {tensor.part for tensor, _ in stored[0].parts}
    if "zero_points" in roles:
        arrays["zero_points"] = matrix.scales, np.dtype(np.uint8)
    if "global_scale" in roles:
        arrays["global_scale"] = (), np.dtype(np.float32)
    return arrays


def _read(
    tensor: FileTensor, part: Part, file: TensorFile, target: np.ndarray, piece_bytes: int, stacked: bool
) -> None:
    """One tensor, or one matrix of a stack, into its array."""
    try:
        if stacked:
            for rows, values in part.pieces(file, target, piece_bytes):
                _check(tensor, values, file.infos[part.tensor].dtype)
                rows[...] = values
            return
        info = file.infos[part.tensor]
        height, *others = info.shape if len(info.shape) > 1 else (1, *info.shape)
        width = math.prod(others)
        at_once = max(piece_bytes // (width * _STORED[info.dtype].itemsize) // tensor.rows, 1) * tensor.rows
        for begin in range(0, height, at_once):
            count = min(at_once, height - begin)
            shape = (count, *others) if len(info.shape) > 1 else info.shape
            piece = file.get_stored(part.tensor, begin * width, shape)
            _check(tensor, piece, info.dtype)
            tensor.store(target, piece, begin)
    except Disagreement as problem:
        raise CheckpointError(f"{part.tensor} in {file.path} {problem}.", file=file.path, key=part.tensor) from problem


def _check(tensor: FileTensor, piece: np.ndarray, dtype: str) -> None:
    """Refuses what is no number."""
    if not finite(piece, dtype, tensor.part == "scales"):
        raise Disagreement("holds values that are not finite, which are never served")


def _check_size(
    one: StoredMatrix, targets: Mapping[str, np.ndarray], dtype: np.dtype, files: Mapping[str, TensorFile]
) -> None:
    """Refuses scales by which a value may be infinite in the model's dtype."""
    scale = too_large(one.matrix.format.codec, targets, dtype)
    if scale is not None:
        name = next(part.tensor for tensor, part in one.parts if tensor.part == "scales")
        raise CheckpointError(
            f"{name} in {files[name].path} has a scale of {scale:.3g}, with which values are not finite in {dtype}.",
            file=files[name].path,
            key=name,
        )
