"""Fields of `adapter_config.json`: each function reads one and says what was expected of it."""

import re
from collections.abc import Mapping
from typing import Any

# Far past any real adapter; within them a rank indexes and a scale stays finite in float32.
MAX_RANK, MAX_ALPHA = 2**20, 1e30


# A group that is repeated, as in (a+)+, can make a match take for ever. Escapes and classes are no groups.
_NO_GROUP, _REPEATED_GROUP = re.compile(r"\\.|\[\^?\]?[^\]]*\]", re.DOTALL), re.compile(r"\)[*+{]")


class Malformed(Exception):
    """A field whose value is none that it may have."""

    def __init__(self, name: str, value: Any, expected: str):
        super().__init__(f"{name} is {shown(value)}, {expected} was expected")
        self.expected = expected


def shown(value: Any) -> str:
    """A value in an error: as JSON has it, and not all of a long one."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def lora(raw: Mapping[str, Any], name: str) -> None:
    if str(raw.get(name, "LORA")).upper() != "LORA":
        raise Malformed(name, raw[name], "LORA, the only one that is supported,")


def rank(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise Malformed(name, value, f"a whole number from 1 to {MAX_RANK}")
    return value


def flag(raw: Mapping[str, Any], name: str) -> bool:
    if not isinstance(raw.get(name), bool | None):
        raise Malformed(name, raw[name], "true or false")
    return bool(raw.get(name))


def alpha(raw: Mapping[str, Any], name: str) -> float:
    return _number(raw.get(name, 8), name)


def _number(value: Any, name: str) -> float:
    # A comparison, not isfinite: an integer of 400 digits has no float. NaN fails it too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise Malformed(name, value, f"a number of at most {MAX_ALPHA:g}")
    return float(value)


def rank_patterns(raw: Mapping[str, Any], name: str) -> dict[str, int]:
    patterns = _patterns(raw, name)
    return {pattern: rank(patterns, pattern) for pattern in patterns}


def alpha_patterns(raw: Mapping[str, Any], name: str) -> dict[str, float]:
    return {pattern: _number(value, f"{name}[{pattern!r}]") for pattern, value in _patterns(raw, name).items()}


def _patterns(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise Malformed(name, value, "an object")
    return {_compiled(pattern, name): item for pattern, item in value.items()}


def names(raw: Mapping[str, Any], name: str) -> str | list[str]:
    value = raw.get(name)
    return _compiled(value, name) if isinstance(value, str) and value else listed_names(raw, name)


def listed_names(raw: Mapping[str, Any], name: str) -> list[str]:
    value = raw.get(name) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise Malformed(name, value, "a list of names")
    return value


def layer_patterns(raw: Mapping[str, Any], name: str) -> list[str]:
    value = names(raw, name)
    return [_compiled(pattern, name) for pattern in ([value] if isinstance(value, str) else value)]


def _compiled(pattern: str, name: str) -> str:
    """The pattern itself, which is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise Malformed(name, pattern, f"a regular expression (it is none: {error})") from error
    if _REPEATED_GROUP.search(_NO_GROUP.sub("x", pattern)):
        raise Malformed(name, pattern, "a regular expression without a repeated group, which may take for ever,")
    return pattern


def layers(raw: Mapping[str, Any], name: str) -> frozenset[int] | None:
    value = raw.get(name)
    values = [value] if isinstance(value, int) else value or []
    if not isinstance(values, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise Malformed(name, value, "a layer or a list of layers")
    return frozenset(values) if values else None
