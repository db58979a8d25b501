"""Writing safetensors files tensor by tensor: no more than one is in memory.

Source of the format: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_moe_lora.files.dtypes import WRITTEN

_NAMES = {dtype: name for name, dtype in WRITTEN.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written; its dtype is one of `dtypes.WRITTEN`."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(path: Path, planned: Mapping[str, Planned], read: Callable[[str], np.ndarray]) -> None:
    """Writes a file of these tensors; each is asked for when its turn comes."""
    write_made(path, planned, ((name, read(name)) for name in _order(planned)))


def write_made(path: Path, planned: Mapping[str, Planned], made: Iterable[tuple[str, np.ndarray]]) -> None:
    """Writes a file of these tensors as they come, each to its place.

    Args:
      path: the file.
      planned: the file's tensors.
      made: each of them once, in any order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    begins: dict[str, int] = {}
    end = 0
    for name in _order(planned):
        begins[name], end = end, end + planned[name].nbytes
        dtype = _NAMES[planned[name].dtype]
        header[name] = {"dtype": dtype, "shape": planned[name].shape, "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        data = file.tell()
        for name, values in made:
            array = np.ascontiguousarray(values).reshape(values.shape)  # which are () for a single number
            assert Planned(array.dtype, array.shape) == planned[name], name
            file.seek(data + begins.pop(name))
            file.write(array.reshape(-1).view(np.uint8).data)
    assert not begins, begins


def _order(planned: Mapping[str, Planned]) -> list[str]:
    """Larger items first, so that every tensor is aligned to its own."""
    return sorted(planned, key=lambda name: -planned[name].dtype.itemsize)
