"""16-bit matrices of a checkpoint, quantised while they are read."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.dtypes import DTYPES
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.models.checkpoint_tensors import Part
from jax_moe_lora.models.quantised.forms import SCALES
from jax_moe_lora.models.quantised.reading import Allocate
from jax_moe_lora.models.quantised.values import too_large
from pallas_kernels.quantised.api import quantise
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.format import Format

_quantise = jax.jit(quantise, static_argnames=("format", "scales_dtype"))


def read_as_quantised(
    parts: Sequence[Part],
    shape: tuple[int, ...],
    format: Format,
    files: Mapping[str, TensorFile],
    dtype: np.dtype,
    allocate: Allocate,
    piece_bytes: int,
) -> Quantised:
    """One leaf of a model in host memory, quantised: a matrix, or those of all experts.

    Matrices are read one after the other, as they are stored, and quantised some rows at a time.

    Args:
      parts: where the matrices stand, one per expert where the leaf has an axis of them.
      shape: of the leaf, `[out, in]` or `[E, out, in]`.
      format: what it becomes.
      files: tensor -> its file.
      dtype: in which all numbers must be finite.
      allocate: makes an array.
      piece_bytes: what is read and quantised at a time.

    Raises:
      CheckpointError: values that are not finite, or not in `dtype` once they are rounded, by name.
    """
    kinds = {DTYPES[files[part.tensor].infos[part.tensor].dtype] for part in parts}
    leaf = empty(shape, format, kinds.pop() if len(kinds) == 1 else np.dtype(np.float32), allocate)
    for index, part in enumerate(parts):
        quantise_part(leaf[index] if len(shape) > 2 else leaf, part, files[part.tensor], dtype, piece_bytes)
    return leaf


def quantise_part(target: Quantised, part: Part, file: TensorFile, dtype: np.dtype, piece_bytes: int) -> None:
    """Reads one matrix and quantises it.

    Args:
      target: of numpy arrays, from `empty`.
      part: where the matrix stands.
      file: holds the tensor.
      dtype: in which all numbers must be finite.
      piece_bytes: what is read and quantised at a time.

    Raises:
      CheckpointError: as `read_as_quantised`.
    """
    quantise_into(target, read_matrix(part, file, target.shape, piece_bytes), piece_bytes)
    if too_large(target.format.codec, {"scales": np.asarray(target.scales)}, dtype) is not None:
        raise CheckpointError(
            f"{part.tensor} in {file.path} holds values that are not finite in {dtype} once they are rounded to "
            f"{target.format.name}."
        )


def empty(shape: tuple[int, ...], format: Format, scales_dtype: np.dtype, allocate: Allocate = np.empty) -> Quantised:
    """Room in host memory for a quantised leaf.

    Args:
      shape: `[..., out, in]`.
      format: without zero points or a global scale.
      scales_dtype: of scales that may have any.
      allocate: makes an array.
    """
    *lead, rows, columns = shape
    values = allocate((*lead, rows, columns // format.per_byte), np.dtype(np.uint8))
    kind = SCALES.get(format.codec, scales_dtype)
    return Quantised(values, allocate((*lead, *format.scales_shape(rows, columns)), kind), format)  # type: ignore[arg-type]


def read_matrix(part: Part, file: TensorFile, shape: tuple[int, ...], piece_bytes: int) -> np.ndarray:
    """One matrix in the dtype that it is stored in.

    Args:
      part: where it stands.
      file: holds the tensor.
      shape: `[out, in]`.
      piece_bytes: what is read at a time.

    Raises:
      CheckpointError: values that are not finite, by name.
    """
    matrix = np.empty(shape, DTYPES[file.infos[part.tensor].dtype])
    for rows, values in part.pieces(file, matrix, piece_bytes):
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{part.tensor} in {file.path} holds values that are not finite, which are never served."
            )
        rows[...] = values
    return matrix


def quantise_into(target: Quantised, matrix: np.ndarray, piece_bytes: int) -> None:
    """Quantises a matrix some rows at a time; a scale's rows stay together.

    Args:
      target: of numpy arrays, from `empty`.
      matrix: `[out, in]`.
      piece_bytes: of float32 that are quantised at a time.
    """
    format = target.format
    height = format.block[0] or len(matrix)
    step = max(piece_bytes // (4 * matrix.shape[1]) // height, 1) * height
    for begin in range(0, len(matrix), step):
        piece = _quantise(jnp.asarray(matrix[begin : begin + step]), format, target.scales.dtype)
        for name, start in (("values", begin), ("scales", begin // height)):
            rows = np.asarray(getattr(piece, name))
            getattr(target, name)[start : start + len(rows)] = rows


def quantise_leaf(formats: Mapping[str, Format], path: str, leaf: Array) -> Array | Quantised:
    """An array on its device, quantised there if it has a format.

    Args:
      formats: path -> format, as `schemes.quantised_formats` gives them.
      path: of the leaf in the parameter tree.
      leaf: the array, or a traced one.
    """
    return _quantise(leaf, formats[path], leaf.dtype) if path in formats else leaf
