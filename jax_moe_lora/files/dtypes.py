"""The dtypes of weights, the one table of them: what files hold, what models and adapter banks compute in."""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jax_moe_lora.errors import InputError

DTYPES = {"F32": np.dtype("<f4"), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2")}
"""A dtype's name in safetensors files -> the dtype. Others are refused when they are read as numbers."""
QUANTISED_DTYPES = {
    "F8_E4M3": np.dtype(np.uint8),  # its bits
    "U8": np.dtype(np.uint8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
"""The same for the tensors that quantised weights are made of."""
WRITTEN = DTYPES | QUANTISED_DTYPES | {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn)}
"""The same for what is written: each name has a dtype of its own."""
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BY_NAME = {dtype.name: dtype for dtype in SAFETENSORS_NAMES}
NAMES = tuple(_BY_NAME)
"""The names that callers use: float32, bfloat16, float16."""
TRAINING_NAMES = ("float32", "bfloat16")
"""Those of a frozen model that gradients flow through: float16 has too small a range for them."""


def check_dtype(dtype: str, names: Sequence[str] = NAMES) -> np.dtype:
    """The dtype of a name.

    Args:
      dtype: the name.
      names: the names that are accepted.

    Raises:
      InputError: another name.
    """
    if dtype not in names:
        raise InputError(f"dtype is {dtype!r}; expected one of {', '.join(names)}.")
    return _BY_NAME[str(dtype)]
