"""How published checkpoints hold a quantised matrix: which tensors, in which dtypes and shapes.

A matrix is what `<module>.weight` is in 16 bits, `[out, in]`. A new form is one `Form` here, and its name in the method
that may have it (`methods.py`). Sources: the model cards and loaders of DeepSeek-V3 and gpt-oss, compressed-tensors
(`compressors/`), AutoAWQ (`utils/packing_utils.py`), AutoGPTQ (`nn_modules/qlinear/`), TensorRT Model Optimizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jax_moe_lora.models.quantised import packing
from jax_moe_lora.models.quantised.settings import Quantisation
from pallas_kernels.quantised import format as formats
from pallas_kernels.quantised.format import Format

Shape = tuple[int, ...]
Part = Literal["values", "scales", "zero_points", "global_scale", "check"]
FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Matrix:
    """A quantised matrix, and what its tensors' shapes follow from.

    Attributes:
      rows: out.
      columns: in.
      format: what it is read as.
    """

    rows: int
    columns: int
    format: Format

    @property
    def scales(self) -> tuple[int, int]:
        """Rows and columns of its scales."""
        return self.format.scales_shape(self.rows, self.columns)


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a quantised matrix.

    Attributes:
      suffix: what stands behind the module's name.
      part: the array of `Quantised` that it becomes; `check` for one that is compared with what it must say.
      dtypes: those that it may have.
      shapes: the shapes that it may have, the usual one first.
      store: writes rows of it, the first of which is given, into the array.
      optional: it may be missing.
      rows: are read together, or in multiples of it.
    """

    suffix: str
    part: Part
    dtypes: tuple[str, ...]
    shapes: Callable[[Matrix], tuple[Shape, ...]]
    store: packing.Store = packing.rows
    optional: bool = False
    rows: int = 1


@dataclass(frozen=True)
class Form:
    """The tensors of a quantised matrix, the one that no other form has first.

    Attributes:
      tensors: by their roles.
      format: the format of a matrix: of its rows and columns, the shape of its scales in the file, and the config.
      stacked: the tensors stack all experts and are called after the projection: `<experts>.down_proj_blocks`.
    """

    tensors: tuple[FileTensor, ...]
    format: Callable[[Quantisation, int, int, Shape], Format | None]
    stacked: bool = False

    @property
    def scales(self) -> FileTensor:
        """The tensor of its scales."""
        return next(tensor for tensor in self.tensors if tensor.part == "scales")


def _whole(matrix: Matrix) -> tuple[Shape, ...]:
    return ((matrix.rows, matrix.columns),)


def _halved(matrix: Matrix) -> tuple[Shape, ...]:
    return ((matrix.rows, matrix.columns // 2),)


def _of_scales(matrix: Matrix) -> tuple[Shape, ...]:
    rows, columns = matrix.scales
    if (rows, columns) == (1, 1):
        return ((), (1,), (1, 1))
    return ((rows, columns), (rows,)) if columns == 1 else ((rows, columns),)


def _one(matrix: Matrix) -> tuple[Shape, ...]:
    return ((), (1,), (1, 1))


def _fp8(settings: Quantisation, rows: int, columns: int, scales: Shape) -> Format | None:
    if settings.block is not None:
        return formats.fp8_block(*settings.block)
    if scales in ((), (1,), (1, 1)):
        return formats.FP8_TENSOR
    return formats.FP8_CHANNEL if scales in ((rows,), (rows, 1)) else None


def _int4(settings: Quantisation, columns: int, groups: int, zero_points: bool) -> Format | None:
    """Groups as the config says, or as many as there are scales; whole columns each."""
    group = columns // groups if settings.group is None and groups else settings.group
    if group is None or columns % 8 or (group and columns % group):
        return None
    return formats.int4(0 if group == columns else group, zero_points)


FP8_INVERSE = Form(
    (
        FileTensor("weight_scale_inv", "scales", ("F32", "BF16", "F16"), _of_scales),
        FileTensor("weight", "values", ("F8_E4M3",), _whole),
    ),
    _fp8,
)
FP8_STACKED = Form(
    (
        FileTensor("_scale_inv", "scales", FLOATS, _of_scales),
        FileTensor("", "values", ("F8_E4M3",), _whole),
    ),
    _fp8,
    stacked=True,
)
FP8 = Form(
    (
        FileTensor("weight_scale", "scales", FLOATS, _of_scales),
        FileTensor("weight", "values", ("F8_E4M3",), _whole),
    ),
    _fp8,
)
MXFP4 = Form(
    (
        FileTensor("_blocks", "values", ("U8",), _halved),
        FileTensor("_scales", "scales", ("U8",), _of_scales),
    ),
    lambda settings, rows, columns, scales: None if columns % 32 else formats.MXFP4,
    stacked=True,
)
INT4_PACKED = Form(
    (
        FileTensor("weight_packed", "values", ("I32",), lambda m: ((m.rows, m.columns // 8),), packing.little_endian),
        FileTensor("weight_scale", "scales", FLOATS, _of_scales),
        FileTensor("weight_shape", "check", ("I64", "I32"), lambda m: ((2,),), packing.same_shape),
    ),
    lambda settings, rows, columns, scales: _int4(settings, columns, scales[-1] if scales else 0, False),
)
INT4_PACKED_ZERO = Form(
    (
        FileTensor(
            "weight_zero_point",
            "zero_points",
            ("I32",),
            lambda m: ((-(-m.rows // 8), m.scales[1]),),
            packing.packed_rows,
        ),
        *INT4_PACKED.tensors,
    ),
    lambda settings, rows, columns, scales: _int4(settings, columns, scales[-1] if scales else 0, True),
)
NVFP4_PACKED = Form(
    (
        FileTensor("weight_global_scale", "global_scale", ("F32",), _one, packing.reciprocal),
        FileTensor("weight_packed", "values", ("U8",), _halved),
        FileTensor("weight_scale", "scales", ("F8_E4M3",), _of_scales),
    ),
    lambda settings, rows, columns, scales: None if columns % 16 else formats.NVFP4,
)
MXFP4_PACKED = Form(
    (
        FileTensor("weight_packed", "values", ("U8",), _halved),
        FileTensor("weight_scale", "scales", ("U8",), _of_scales),
    ),
    lambda settings, rows, columns, scales: None if columns % 32 else formats.MXFP4,
)
NVFP4_MODELOPT = Form(
    (
        FileTensor("weight_scale_2", "global_scale", ("F32",), _one),
        FileTensor("weight", "values", ("U8",), _halved),
        FileTensor("weight_scale", "scales", ("F8_E4M3",), _of_scales),
    ),
    lambda settings, rows, columns, scales: None if columns % 16 else formats.NVFP4,
)


def _turned(matrix: Matrix) -> tuple[Shape, ...]:
    return (matrix.scales[::-1],)


def _turned_packed(matrix: Matrix) -> tuple[Shape, ...]:
    return ((matrix.scales[1], matrix.rows // 8),)


AWQ = Form(
    (
        FileTensor("qweight", "values", ("I32",), lambda m: ((m.columns, m.rows // 8),), packing.awq_values, rows=2),
        FileTensor("scales", "scales", FLOATS, _turned, packing.turned),
        FileTensor("qzeros", "zero_points", ("I32",), _turned_packed, packing.awq_zeros),
    ),
    lambda settings, rows, columns, scales: (
        None if rows % 8 else _int4(settings, columns, scales[0] if scales else 0, True)
    ),
)


def _gptq(zeros: packing.Store) -> Form:
    return Form(
        (
            FileTensor("qweight", "values", ("I32",), lambda m: ((m.columns // 8, m.rows),), packing.gptq_values),
            FileTensor("scales", "scales", FLOATS, _turned, packing.turned),
            FileTensor("qzeros", "zero_points", ("I32",), _turned_packed, zeros),
            FileTensor("g_idx", "check", ("I32",), lambda m: ((m.columns,),), packing.ordered_groups, optional=True),
        ),
        lambda settings, rows, columns, scales: (
            None if rows % 8 else _int4(settings, columns, scales[0] if scales else 0, True)
        ),
    )


FORMS: Mapping[str, Form] = {
    "fp8_inverse": FP8_INVERSE,
    "fp8_stacked": FP8_STACKED,
    "fp8": FP8,
    "mxfp4": MXFP4,
    "int4_packed_zero": INT4_PACKED_ZERO,  # before the one whose tensors it has too
    "int4_packed": INT4_PACKED,
    "nvfp4_packed": NVFP4_PACKED,
    "mxfp4_packed": MXFP4_PACKED,
    "nvfp4": NVFP4_MODELOPT,
    "awq": AWQ,
    "gptq": _gptq(packing.gptq_zeros),
    "gptq_v2": _gptq(packing.gptq_zeros_v2),
}
"""Form by name. A matrix has the first one whose first tensor is there, of those that its config's method may have."""

ACTIVATIONS = ("input_scale", "activation_scale", "input_global_scale", "output_scale", "k_scale", "v_scale", "q_scale")
"""Scales of rows and of caches, which stay in 16 bits here; what tensor names may end in."""
SCALES = {"fp8": np.dtype(np.float32), "mxfp4": np.dtype(np.uint8)}
"""The dtype of a codec's scales, where it is not the file's."""
