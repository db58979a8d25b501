"""Writing safetensors files tensor by tensor: no more than one is in memory.

Source of the format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from jax_moe_lora.safetensors_io import TensorInfo

NUMPY_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def info_of(array: np.ndarray) -> TensorInfo:
    return TensorInfo(_NAMES[array.dtype], array.shape)


def nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * NUMPY_DTYPES[info.dtype].itemsize


def write_tensors(path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray]) -> None:
    """Writes a file of these tensors; each is asked for when its turn comes."""
    # Larger items first, so that every tensor is aligned to its own.
    names = sorted(infos, key=lambda name: -NUMPY_DTYPES[infos[name].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in names:
        begin, end = end, end + nbytes(infos[name])
        header[name] = {"dtype": infos[name].dtype, "shape": infos[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.ascontiguousarray(read(name))
            assert info_of(array) == infos[name], name
            file.write(array.reshape(-1).view(np.uint8).data)
