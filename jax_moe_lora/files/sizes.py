"""Byte sizes as people write them."""

import re

from jax_moe_lora.errors import InputError

MOST = 10**18
_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_bytes(size: int | str) -> int:
    """The number of bytes that a size means.

    Args:
      size: text such as `"4GiB"` or `"500 MB"`, or a plain number of bytes.

    Returns:
      Bytes, rounded down.

    Raises:
      InputError: not a size.
    """
    if isinstance(size, int) and abs(size) >= MOST:  # compared first: thousands of digits cannot be printed
        raise InputError("Size is not understood: it has too many digits; write one such as '4GiB'.")
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)\s*", str(size))
    if isinstance(size, bool) or match is None or match[2].lower() not in _UNITS:
        shown = repr(size) if len(repr(size)) < 60 else f"{repr(size)[:60]}…"
        raise InputError(f"Size {shown} is not understood; write bytes or a number with a unit, such as '4GiB'.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(size: float) -> str:
    """`1536` as `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
