"""Opening files that nobody vouches for: safetensors and JSON, every failure an error that names the file.

Files are read, never mapped: a mapped file that is truncated ends the process, a read one ends early. What was opened
is what is checked and read (no second look-up of the path), and a file that changed meanwhile is refused.
"""

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe_lora.errors import JaxMoELoRAError
from jax_moe_lora.files.dtypes import DTYPES, QUANTISED_DTYPES
from jax_moe_lora.files.safetensors_header import TensorInfo, parse_header

MAX_JSON_BYTES = 16 * 2**20
# Of what `json` makes of a text, the smallest values take 20 times their characters.
MAX_JSON_VALUES = 2**20
# Twice that of 61 layers of 256 experts with three matrices and two sides each, the most that was seen.
MAX_HEADER_BYTES = 32 * 2**20
Stamp = tuple[int, int, int, int]


class TensorFile:
    """An open safetensors file, made by `open_tensors`. Failures to read raise its `error` type and name the file.

    Attributes:
      infos: what its header says of each tensor.
    """

    def __init__(self, path: Path, file: BufferedReader, error: type[JaxMoELoRAError]):
        self.path, self._file, self._error = path, file, error
        with self._reading():
            self._read_header()

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        header_size = int.from_bytes(self._read(8, 0), "little")
        self._data = 8 + header_size
        if self._data > size:
            raise ValueError(f"its header of {header_size} bytes is longer than the file of {size} bytes")
        if header_size > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {header_size} bytes; at most {MAX_HEADER_BYTES} were expected")
        self.infos = parse_header(self._read(header_size, 8), size - self._data)

    def get_tensor(self, name: str) -> np.ndarray:
        with self._reading():
            return self._array(self.infos[name], self.infos[name].shape, 0)

    def get_values(self, name: str, begin: int, shape: tuple[int, ...]) -> np.ndarray:
        """A run of a tensor's values, in the order of the file.

        Args:
          name: the tensor.
          begin: the first of them, within the tensor.
          shape: theirs; as many values as it has, which the tensor must hold.
        """
        info = self.infos[name]
        with self._reading():
            return self._array(info, shape, begin * (info.nbytes // max(math.prod(info.shape), 1)))

    def get_stored(self, name: str, begin: int, shape: tuple[int, ...]) -> np.ndarray:
        """As `get_values`, of a tensor that may also be one of those that quantised weights are made of.

        Args:
          name: the tensor.
          begin: as there.
          shape: as there.
        """
        info = self.infos[name]
        with self._reading():
            offset = begin * (info.nbytes // max(math.prod(info.shape), 1))
            return self._array(info, shape, offset, DTYPES | QUANTISED_DTYPES)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, MemoryError) as problem:
            message = f"{self.path} cannot be read as a safetensors file: {problem}; it may be truncated or corrupt."
            raise self._error(message, file=self.path) from problem

    def _array(
        self, info: TensorInfo, shape: tuple[int, ...], offset: int, dtypes: Mapping[str, np.dtype] = DTYPES
    ) -> np.ndarray:
        if info.dtype not in dtypes:
            raise ValueError(f"dtype {info.dtype} is none of {', '.join(dtypes)}")
        array = np.empty(shape, dtypes[info.dtype])
        self._fill(memoryview(array.reshape(-1).view(np.uint8)), self._data + info.begin + offset)
        return array

    def _read(self, size: int, offset: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) < size:
            raise ValueError(f"it ends after {offset + len(data)} bytes; expected {offset + size}")
        return data

    def _fill(self, target: memoryview, offset: int) -> None:
        self._file.seek(offset)
        done = self._file.readinto(target)
        if done < len(target):
            raise ValueError(f"it ends after {offset + done} bytes; expected {offset + len(target)}")


def tensor_infos(path: Path, error: type[JaxMoELoRAError]) -> dict[str, TensorInfo]:
    """Every tensor's dtype and shape, from the header alone.

    Args:
      path: the file.
      error: what is raised where the header does not fit the file, or the file cannot be read.

    Returns:
      Name -> dtype, shape and place.
    """
    with open_tensors(path, error) as tensors:
        return tensors.infos


@contextmanager
def open_tensors(path: Path, error: type[JaxMoELoRAError]) -> Iterator[TensorFile]:
    """Opens a safetensors file, which must not change before the block ends.

    Args:
      path: the file.
      error: what is raised where it cannot be read.
    """
    with open_regular(path, error) as file:
        yield TensorFile(path, file, error)


def read_json(path: Path, error: type[JaxMoELoRAError]) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
      path: the file.
      error: what is raised where it cannot be read, is not one JSON object, or has a key twice.
    """
    with open_regular(path, error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, MAX_JSON_BYTES) + 1)
            if len(data) > MAX_JSON_BYTES:
                message = f"{path} has {size} bytes; a JSON file of at most {MAX_JSON_BYTES} was expected."
                raise error(message, file=path)
            text = data.decode("utf-8-sig")  # Windows programs put a byte order mark before it
        except (UnicodeError, OSError) as problem:
            raise error(f"{path} is not valid JSON: {problem}.", file=path) from problem
    del data  # a text may take four times as much
    return parse_json(text, str(path), error)


def parse_json(text: str, where: str, error: type[JaxMoELoRAError]) -> dict[str, Any]:
    """The JSON object in a text.

    Args:
      text: the text.
      where: what errors call it.
      error: what is raised where it is not one JSON object, or has a key twice.
    """

    def bad(problem: str) -> JaxMoELoRAError:
        return error(f"{where} {problem}.", file=where)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            first: set[str] = set()
            twice = next(key for key, _ in pairs if key in first or first.add(key))  # type: ignore[func-returns-value]
            raise bad(f"has the key {twice!r} twice")
        return seen

    if sum(map(text.count, ",[{")) > MAX_JSON_VALUES:
        raise bad(f"is not valid JSON: it has too many values; at most {MAX_JSON_VALUES} were expected")
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as problem:
        raise bad(f"is not valid JSON: {problem.msg} at character {problem.pos + 1}") from problem
    except RecursionError as problem:
        raise bad("is not valid JSON: it is nested too deeply") from problem
    except ValueError as problem:
        if isinstance(problem, JaxMoELoRAError):
            raise
        raise bad("is not valid JSON: it has a number of too many digits") from problem
    if not isinstance(value, dict):
        raise bad(f"holds a JSON {type(value).__name__}; expected an object")
    return value


@contextmanager
def unchanged(error: type[JaxMoELoRAError], *paths: Path) -> Iterator[None]:
    """Refuses files that are written to, replaced, made or removed before the block ends."""
    before = [stamp_of(path) for path in paths]
    yield
    for path, stamp in zip(paths, before, strict=True):
        if stamp_of(path) != stamp:
            raise error(f"{path} changed while it was read; read it again when it is complete.", file=path)


def stamp_of(path: Path) -> Stamp | None:
    """Device, inode, bytes and time of change; None for a file that is not there."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextmanager
def open_regular(path: Path, error: type[JaxMoELoRAError]) -> Iterator[BufferedReader]:
    """Reads without a buffer. Links are followed, as the hub's cache needs; what they lead to must be a file."""
    with unchanged(error, path):
        try:
            # Asked before it is opened: opening a device may do something, and opening a pipe waits for a writer.
            if not stat.S_ISREG(path.stat().st_mode):
                raise error(f"{path} is not a regular file.", file=path)
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as problem:
            raise error(f"{path} does not exist.", file=path) from problem
        except (OSError, ValueError) as problem:
            if isinstance(problem, JaxMoELoRAError):
                raise
            raise error(f"{path} cannot be opened: {problem}.", file=path) from problem
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise error(f"{path} is not a regular file.", file=path)
            yield file
