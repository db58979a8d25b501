"""What values and scales of quantised matrices may be, with numpy alone."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

LARGEST = {"fp8": 448.0, "mxfp4": 6.0, "nvfp4": 6.0, "int4": 8.0, "int4_zero": 16.0}
"""The largest value of a codec, before its scale."""
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def finite(piece: np.ndarray, dtype: str, scales: bool) -> bool:
    """Whether all are numbers.

    Args:
      piece: of a tensor.
      dtype: of the tensor, as safetensors names it.
      scales: it holds scales; those in uint8 are exponents.
    """
    if dtype == "F8_E4M3":
        return not ((piece & 0x7F) == 0x7F).any()
    if dtype == "U8" and scales:
        return not (piece == 255).any()  # NaN in e8m0
    return piece.dtype.kind in "iu" or bool(np.isfinite(piece).all())


def too_large(codec: str, arrays: Mapping[str, np.ndarray], dtype: np.dtype) -> float | None:
    """The largest scale of a matrix, if a value may not be finite by it.

    Args:
      codec: of the matrix's format.
      arrays: its `scales`, and `global_scale` where it has one.
      dtype: in which all numbers must be finite.

    Returns:
      The scale; None where all values are finite.
    """
    scales = arrays["scales"]
    if codec == "mxfp4":
        largest = 2.0 ** (int(scales.max()) - 127)
    elif codec == "nvfp4":
        largest = float(_E4M3[int((scales & 0x7F).max())])
    else:
        largest = float(np.abs(scales).max())
    if "global_scale" in arrays:
        largest *= abs(float(arrays["global_scale"]))
    most = 65504.0 if dtype == np.float16 else float(np.finfo(np.float32).max)  # bfloat16's lies just below
    return largest if largest * LARGEST[codec] > most * (1 - 2**-9) else None
