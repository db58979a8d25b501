"""Byte sizes as people write them."""

import re

from jax_moe_lora.errors import InputError

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


def parse_bytes(size: int | str) -> int:
    """Bytes of `"4GiB"`, `"500 MB"` or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if isinstance(size, bool) or match is None or match[2].lower() not in _UNITS:
        raise InputError(f"Size {size!r} is not understood; write bytes or a number with a unit, such as '4GiB'.")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_bytes(size: float) -> str:
    """`1536` as `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
