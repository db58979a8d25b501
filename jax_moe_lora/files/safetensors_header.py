"""The header of a safetensors file, read by its grammar alone: JSON objects of tensors, and nothing that nests.

A general JSON parser takes twenty times the memory of a text such as `[[],[],...]`. This one holds nothing but the
tensors that it has understood, and stops at the first byte that is something else.

Source of the format: github.com/huggingface/safetensors, README and `safetensors/src/tensor.rs`.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

# Bits of one element, of every dtype that the format has.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
}
_NAME_BYTES = 1024
_SPACE = rb"[ \t\r\n]*+"
_NUMBER = rb"(?:0|[1-9][0-9]{0,18}+)"
_STRING = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'


def _token(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(_SPACE + rb"(" + pattern + rb")" + _SPACE)


_OPEN, _KEY, _MORE = _token(rb"\{"), _token(_STRING + _SPACE + rb":"), _token(rb"[,}]")
_TEXT, _DTYPE = _token(_STRING), _token(rb'"[A-Z0-9_]{1,16}"')
_SIZES = _token(rb"\[" + _SPACE + rb"(?:" + _NUMBER + _SPACE + rb"(?:," + _SPACE + _NUMBER + _SPACE + rb"){0,63}+)?\]")
_FIELDS = {"dtype": _DTYPE, "shape": _SIZES, "data_offsets": _SIZES}


class HeaderError(ValueError):
    """A header that is not what the format says."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
      dtype: in safetensors' spelling, such as `BF16`. begin, end: its bytes, counted from the end of the header.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def parse_header(text: bytes, data_bytes: int) -> dict[str, TensorInfo]:
    """The tensors of a safetensors header, by name.

    Args:
      text: the header.
      data_bytes: how many bytes follow it in the file.

    Returns:
      Name -> dtype, shape and place.

    Raises:
      HeaderError: the text is not a header, a name occurs twice or cannot be printed, or the tensors do not fill the
        bytes that follow, one after the other, each with the size that its dtype and shape need.
    """
    cursor = _Cursor(text)
    infos: dict[str, TensorInfo] = {}
    for name in cursor.members():
        if name == "__metadata__":
            for _ in cursor.members():
                _decode(cursor.take(_TEXT, "a text"))
        else:
            infos[name] = _tensor(cursor, name)
    if cursor.at != len(text):
        raise HeaderError(f"the header goes on at byte {cursor.at}, behind its end")
    _check_offsets(infos, data_bytes)
    return infos


class _Cursor:
    """A place in a header, and what may come next."""

    def __init__(self, text: bytes):
        self.text, self.at = text, 0

    def take(self, token: re.Pattern[bytes], expected: str) -> bytes:
        match = token.match(self.text, self.at)
        if match is None:
            raise HeaderError(f"the header has no {expected.removeprefix('a ')} at byte {self.at}")
        self.at = match.end()
        return match[1]

    def members(self) -> Iterator[str]:
        """The keys of an object; the caller takes the value of each before it asks for the next."""
        self.take(_OPEN, "{")
        seen: set[str] = set()
        empty = _MORE.match(self.text, self.at)
        if empty is not None and empty[1] == b"}":
            self.at = empty.end()
            return
        more = b","
        while more == b",":
            key = _name(self.take(_KEY, "a key")[:-1])
            if key in seen:
                raise HeaderError(f"the header has the key {key!r} twice")
            seen.add(key)
            yield key
            more = self.take(_MORE, ", or }")


def _name(quoted: bytes) -> str:
    """A key, which errors and tables will show."""
    if len(quoted) > _NAME_BYTES:
        raise HeaderError(f"the header has a key of {len(quoted)} bytes; expected at most {_NAME_BYTES}")
    name = _decode(quoted)
    if not name.isprintable():
        raise HeaderError(f"the header has the key {name!r}, which cannot be printed")
    return name


def _decode(quoted: bytes) -> str:
    try:
        text = json.loads(quoted)
        text.encode()
    except ValueError as error:  # no UTF-8, an escape that JSON does not have, or half of a surrogate pair
        raise HeaderError(f"the header has a text that is none: {error}") from error
    return text


def _tensor(cursor: _Cursor, name: str) -> TensorInfo:
    fields: dict[str, bytes] = {}
    for field in cursor.members():
        if field not in _FIELDS:
            raise HeaderError(f"{name} has the field {field!r}; expected {', '.join(_FIELDS)}")
        fields[field] = cursor.take(_FIELDS[field], f"{field} of {name}")
    if len(fields) < len(_FIELDS):
        raise HeaderError(f"{name} has no {next(field for field in _FIELDS if field not in fields)}")
    dtype, offsets = fields["dtype"].strip(b'"').decode(), _sizes(fields["data_offsets"])
    if dtype not in _BITS:
        raise HeaderError(f"{name} has the dtype {dtype!r}, which the format does not have")
    if len(offsets) != 2:
        raise HeaderError(f"{name} has {len(offsets)} data_offsets; expected two")
    return TensorInfo(dtype, _sizes(fields["shape"]), *offsets)


def _sizes(text: bytes) -> tuple[int, ...]:
    return tuple(map(int, re.findall(rb"[0-9]+", text)))


def _check_offsets(infos: dict[str, TensorInfo], data_bytes: int) -> None:
    at = 0
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        bits = math.prod(info.shape) * _BITS[info.dtype]
        if info.begin != at or bits != 8 * (info.end - info.begin):
            raise HeaderError(
                f"{name} has bytes {info.begin} to {info.end}; expected {at} to {at + -(-bits // 8)} by its dtype, its "
                "shape and the tensors before it"
            )
        at = info.end
    if at != data_bytes:
        raise HeaderError(f"the tensors have {at} bytes, and {data_bytes} follow the header")
