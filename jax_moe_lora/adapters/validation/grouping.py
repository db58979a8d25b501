"""Findings that say the same of many tensors, as one: layers 0-47, gate and up."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from jax_moe_lora.adapters.validation.finding import Finding

# What differs between a layer's, an expert's or a module's finding and the next one's.
_PLACE = re.compile(r"(?<=layer )\d+|(?<=layers\.)\d+|(?<=expert )\d+|(?<=experts\.)\d+")
_MODULE = re.compile(r"(?<![a-z])(gate_up|gate|up|down|[qkvo]|w[123])(?=_proj\b|\b)")
_SIDE, _LAYER, _EXPERT = (
    re.compile(pattern) for pattern in (r"\.(lora_[AB])\.weight$", r"\blayers\.(\d+)\.", r"\bexperts\.(\d+)\.")
)
_MOST = 5


def grouped(findings: Iterable[Finding]) -> list[Finding]:
    """The findings in their order, those that say the same of several tensors as one.

    Args:
      findings: one for each thing that is wrong.
    """
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        same = finding.message.replace(finding.key, "KEY") if finding.key else finding.message
        parts = (finding.severity, finding.file, finding.expected, _masked(finding.found), _masked(same))
        groups.setdefault(parts, []).append(finding)
    return [_one(members) for members in groups.values()]


def _masked(text: str) -> str:
    return _MODULE.sub("MODULE", _PLACE.sub("N", text))


def _one(members: Sequence[Finding]) -> Finding:
    first, keys = members[0], tuple(dict.fromkeys(member.key for member in members))
    if len(keys) == 1:
        return first
    others = f"{len(keys) - 1:,} other{'s' if len(keys) > 2 else ''}"
    return replace(first, message=f"{first.message} The same holds for {others}: {_where(keys)}.", keys=keys)


def _where(keys: Sequence[str]) -> str:
    """What the keys have between them, as ranges and lists."""
    columns: dict[str, dict[str, None]] = {"layer": {}, "expert": {}, "module": {}, "side": {}}
    for key in keys:
        path = _SIDE.sub("", key)
        for name, match in (
            ("layer", _LAYER.search(key)),
            ("expert", _EXPERT.search(key)),
            ("side", _SIDE.search(key)),
        ):
            columns[name] |= {match[1]: None} if match else {}
        columns["module"][path.rpartition(".")[2]] = None
    if not columns["layer"]:
        more = f" and {len(keys) - _MOST} more" if len(keys) > _MOST else ""
        return ", ".join(keys[1:_MOST]) + more
    parts = [
        f"{name}{'s' if len(numbers) > 1 else ''} {ranges(sorted(map(int, numbers)))}"
        for name, numbers in columns.items()
        if numbers and name in ("layer", "expert")
    ]
    return ", ".join(parts + [_listed(columns[name]) for name in ("module", "side") if columns[name]])


def _listed(words: Collection[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def ranges(numbers: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`.

    Args:
      numbers: ascending.
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
