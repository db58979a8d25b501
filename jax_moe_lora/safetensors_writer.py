"""Writing safetensors files tensor by tensor: no more than one is in memory.

Source of the format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_moe_lora.safetensors_io import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Outline:
    """What a tensor will be: its dtype in safetensors' spelling, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> "Outline":
        return cls(_NAMES[array.dtype], array.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_tensors(path: Path, outlines: Mapping[str, Outline], read: Callable[[str], np.ndarray]) -> None:
    """Writes a file of these tensors; each is asked for when its turn comes."""
    # Larger items first, so that every tensor is aligned to its own.
    names = sorted(outlines, key=lambda name: -DTYPES[outlines[name].dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in names:
        begin, end = end, end + outlines[name].nbytes
        header[name] = {"dtype": outlines[name].dtype, "shape": outlines[name].shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            array = np.ascontiguousarray(read(name))
            assert Outline.of(array) == outlines[name], name
            file.write(array.reshape(-1).view(np.uint8).data)
