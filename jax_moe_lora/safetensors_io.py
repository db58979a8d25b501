"""Opening files that nobody vouches for: safetensors and JSON, every failure an error that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 by it)
from safetensors import SafetensorError, safe_open

from jax_moe_lora.errors import JaxMoELoRAError

MAX_JSON_BYTES = 16 * 2**20
DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor: dtype in safetensors' spelling, such as `BF16`, and shape."""

    dtype: str
    shape: tuple[int, ...]


def tensor_infos(path: Path, error: type[JaxMoELoRAError]) -> dict[str, TensorInfo]:
    """Every tensor's dtype and shape, from the header alone; safetensors checks offsets against the file's size."""
    with open_tensors(path, error) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  (a handle, not a dict)
        return {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


@contextmanager
def open_tensors(path: Path, error: type[JaxMoELoRAError]) -> Iterator[Any]:
    """A safetensors handle (`get_tensor`, `get_slice`); failures inside the block also become `error`."""
    _check_regular(path, error)
    try:
        with safe_open(str(path), framework="numpy") as tensors:
            yield tensors
    # numpy lacks fp8 by name, which safetensors meets as an AttributeError.
    except (SafetensorError, OSError, TypeError, ValueError, AttributeError) as problem:
        if isinstance(problem, JaxMoELoRAError):
            raise
        raise error(
            f"{path} cannot be read as a safetensors file: {problem}; it may be truncated or corrupt."
        ) from problem


def read_json(path: Path, error: type[JaxMoELoRAError]) -> dict[str, Any]:
    """The JSON object in a file; a key that stands twice is refused."""
    _check_regular(path, error)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise error(f"{path} has {size} bytes; a JSON file of at most {MAX_JSON_BYTES} was expected.")
    try:
        text = path.read_text(encoding="utf-8")
    except (ValueError, OSError) as problem:
        raise error(f"{path} is not valid JSON: {problem}.") from problem
    return parse_json(text, str(path), error)


def parse_json(text: str, where: str, error: type[JaxMoELoRAError]) -> dict[str, Any]:
    """The JSON object in a text, which errors call `where`; a key that stands twice is refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            twice = next(key for index, (key, _) in enumerate(pairs) if key in [k for k, _ in pairs[:index]])
            raise error(f"{where} has the key {twice!r} twice.")
        return seen

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as problem:
        raise error(f"{where} is not valid JSON: {problem.msg} at character {problem.pos + 1}.") from problem
    except RecursionError as problem:
        raise error(f"{where} is not valid JSON: it is nested too deeply.") from problem
    except ValueError as problem:
        if isinstance(problem, JaxMoELoRAError):
            raise
        raise error(f"{where} is not valid JSON: it has a number of too many digits.") from problem
    if not isinstance(value, dict):
        raise error(f"{where} holds a JSON {type(value).__name__}; expected an object.")
    return value


def _check_regular(path: Path, error: type[JaxMoELoRAError]) -> None:
    if not path.exists():
        raise error(f"{path} does not exist.")
    if not path.is_file():
        raise error(f"{path} is not a regular file.")
