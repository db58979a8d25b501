"""Fields of `adapter_config.json`.

Each reader takes the whole object and a field's name, and returns the field's value; one that is not there has PEFT's
default. A value that the field may not have raises `Malformed`, which says what was expected.
"""

import re
from collections.abc import Mapping
from typing import Any

from jax_moe_lora.adapters.formats.names import WRAPPED, without_prefix
from jax_moe_lora.adapters.formats.neutral_fields import says_nothing
from jax_moe_lora.adapters.formats.patterns import is_plain, suffixes
from jax_moe_lora.adapters.formats.regex_guard import is_safe

# Far past any real adapter; within them a rank indexes and a scale stays finite in float32.
MAX_RANK, MAX_ALPHA = 2**20, 1e30
# Each takes a rank, and as such a row as wide as the vocabulary.
MAX_TRAINED_TOKENS = 512
RANK_MAJOR, GROUPED_BY_EXPERT, MIXED = "rank_major", "grouped_by_expert", "mixed"
B_LAYOUTS = (RANK_MAJOR, GROUPED_BY_EXPERT)
"""Orders of the columns of a 3-D parameter's B: by rank and then by expert, as PEFT has it, or the other way round."""


class Malformed(Exception):
    """A field with a value that it may not have."""

    def __init__(self, name: str, value: Any, expected: str):
        """Says what came and what was expected.

        Args:
          name: the field.
          value: what it holds.
          expected: in words.
        """
        super().__init__(f"{name} is {shown(value)}; expected {expected}")
        self.expected = expected


def shown(value: Any) -> str:
    """A value for an error message, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def lora(raw: Mapping[str, Any], name: str) -> None:
    """The type of the adapter, which must be LoRA."""
    if str(raw.get(name) or "LORA").upper() != "LORA":
        raise Malformed(name, raw[name], "LORA, the only type that is supported")


def rank(raw: Mapping[str, Any], name: str) -> int:
    """A rank."""
    return _rank(raw.get(name), name)


def _rank(value: Any, name: str) -> int:
    number = _whole(value)
    if number is None or not 1 <= number <= MAX_RANK:
        raise Malformed(name, value, f"a whole number from 1 to {MAX_RANK}")
    return number


def _whole(value: Any) -> int | None:
    """A whole number, which some tools write as `4.0`; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def flag(raw: Mapping[str, Any], name: str) -> bool:
    """True or false; what says nothing is false."""
    value = raw.get(name)
    if not isinstance(value, bool) and not says_nothing(value):
        raise Malformed(name, value, "true or false")
    return bool(value)


def alpha(raw: Mapping[str, Any], name: str) -> float:
    """An alpha, 8 where none is given."""
    return _number(raw.get(name, 8), name)


def _number(value: Any, name: str) -> float:
    # A comparison, not isfinite: an integer of 400 digits has no float. NaN fails it too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise Malformed(name, value, f"a number of at most {MAX_ALPHA:g}")
    return float(value)


def rank_patterns(raw: Mapping[str, Any], name: str) -> dict[str, int]:
    """Pattern -> rank."""
    return {pattern: _rank(value, f"{name}[{pattern!r}]") for pattern, value in _patterns(raw, name).items()}


def alpha_patterns(raw: Mapping[str, Any], name: str) -> dict[str, float]:
    """Pattern -> alpha."""
    return {pattern: _number(value, f"{name}[{pattern!r}]") for pattern, value in _patterns(raw, name).items()}


def _patterns(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise Malformed(name, value, "an object")
    return {_compiled(pattern, name): item for pattern, item in value.items()}


def names(raw: Mapping[str, Any], name: str) -> str | list[str]:
    """A list of names, or one regular expression."""
    value = raw.get(name)
    return _compiled(value, name) if isinstance(value, str) and value else listed_names(raw, name)


def listed_names(raw: Mapping[str, Any], name: str) -> list[str]:
    """A list of names."""
    value = raw.get(name) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise Malformed(name, value, "a list of names")
    return value


def layer_patterns(raw: Mapping[str, Any], name: str) -> list[str]:
    """Regular expressions; one may stand without a list."""
    value = names(raw, name)
    return [_compiled(pattern, name) for pattern in ([value] if isinstance(value, str) else value)]


def _compiled(pattern: str, name: str) -> str:
    """The pattern itself, once it is known to be a regular expression that takes little time."""
    if is_plain(pattern):
        return pattern
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise Malformed(name, pattern, f"a regular expression (this one is invalid: {error})") from error
    if not is_safe(pattern):
        raise Malformed(name, pattern, "a regular expression whose repeated groups cannot take for ever")
    return pattern


def layers(raw: Mapping[str, Any], name: str) -> frozenset[int] | None:
    """Indices of layers; None for all of them."""
    value = raw.get(name)
    values = [value] if isinstance(value, int | float) and not isinstance(value, bool) else value or []
    numbers = [_whole(item) for item in values] if isinstance(values, list) else [None]
    whole_numbers = frozenset(number for number in numbers if number is not None)
    if None in numbers:
        raise Malformed(name, value, "a layer or a list of layers")
    return whole_numbers or None


def token_ids(raw: Mapping[str, Any], name: str) -> dict[str, list[int]]:
    """Path of embedding or head -> ids of its trained tokens; a list without a module's name is the embedding's."""
    value = raw.get(name) or {}
    by_module = {"embed_tokens": value} if isinstance(value, list) else value
    if not isinstance(by_module, dict):
        raise Malformed(name, value, "a list of token ids, or an object with such a list for each module")
    ids_of: dict[str, list[int]] = {}
    for module, ids in by_module.items():
        plain = without_prefix(module, WRAPPED)
        path = next((path for path in ("model.embed_tokens", "lm_head") if plain in suffixes(path)), None)
        if path is None or path in ids_of:
            raise Malformed(name, value, "ids for embed_tokens or lm_head, each of them once")
        numbers = [_whole(item) for item in ids or []] if isinstance(ids or [], list) else [None]
        whole_numbers = [number for number in numbers if number is not None and number >= 0]
        if len(set(whole_numbers)) < len(numbers):
            raise Malformed(f"{name}[{module!r}]", ids, "a list of token ids, each of them once")
        if len(numbers) > MAX_TRAINED_TOKENS:
            raise Malformed(f"{name}[{module!r}]", ids, f"at most {MAX_TRAINED_TOKENS} token ids, not {len(numbers)}")
        if numbers:
            ids_of[path] = whole_numbers
    return ids_of


def saved_modules(raw: Mapping[str, Any], name: str) -> frozenset[str]:
    """Paths of embedding and head among the modules that are saved as a whole."""
    ends = {full.rpartition(".")[2]: full for full in ("model.embed_tokens", "lm_head")}
    return frozenset(ends[end] for entry in listed_names(raw, name) if (end := entry.rpartition(".")[2]) in ends)


def other_saved_modules(raw: Mapping[str, Any]) -> list[str]:
    """Modules that are saved as a whole and are neither embedding nor head."""
    entries = raw.get("modules_to_save")
    listed = entries if isinstance(entries, list) else []
    return [entry for entry in listed if str(entry).rpartition(".")[2] not in ("embed_tokens", "lm_head")]


def b_layout(raw: Mapping[str, Any], name: str) -> str | None:
    """Unsloth's note on the order of B's columns in 3-D parameters; None where there is none."""
    value = raw.get(name) or None
    if value not in (None, *B_LAYOUTS, MIXED):
        raise Malformed(name, value, " or ".join(B_LAYOUTS))
    return value


def b_layouts(raw: Mapping[str, Any], name: str) -> dict[str, str]:
    """Parameter, such as `gate_up_proj`, -> the order of its B's columns, from Unsloth's longer note."""
    note = raw.get(name) or {}
    parameters = note.get("parameters") or {} if isinstance(note, dict) else None
    if not isinstance(parameters, dict) or not all(isinstance(entry, dict) for entry in parameters.values()):
        raise Malformed(name, note, "an object with an object for each of its parameters")
    if note.get("lora_A_layout") not in (None, GROUPED_BY_EXPERT):
        raise Malformed(f"{name}.lora_A_layout", note["lora_A_layout"], GROUPED_BY_EXPERT)
    layouts = {parameter: b_layout(entry, "lora_B_layout") for parameter, entry in parameters.items()}
    return {parameter: layout for parameter, layout in layouts.items() if layout is not None}


def unsloth_field(raw: Mapping[str, Any]) -> str | None:
    """The field by which a config says that Unsloth made the adapter; None where none does."""
    fields = ("base_model_name_or_path", "auto_mapping")
    return next((field for field in fields if "unsloth" in str(raw.get(field)).lower()), None)
