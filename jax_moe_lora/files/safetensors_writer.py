"""Writing safetensors files tensor by tensor: no more than one is in memory.

Source of the format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_moe_lora.files.dtypes import SAFETENSORS_NAMES


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written; its dtype is one of `dtypes.DTYPES`."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, planned: Mapping[str, Planned], read: Callable[[str], np.ndarray]) -> None:
    """Writes a file of these tensors; each is asked for when its turn comes."""
    # Larger items first, so that every tensor is aligned to its own.
    names = sorted(planned, key=lambda name: -planned[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in names:
        begin, end = end, end + planned[name].nbytes
        dtype = SAFETENSORS_NAMES[planned[name].dtype]
        header[name] = {"dtype": dtype, "shape": planned[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.ascontiguousarray(read(name))
            assert Planned(array.dtype, array.shape) == planned[name], name
            file.write(array.reshape(-1).view(np.uint8).data)
