"""Ranks and scales as `adapter_config.json` says them, so that what is read back has the same bits."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jax_moe_lora.adapters.formats.config_fields import MAX_ALPHA, RANK_MAJOR, unsloth_field
from jax_moe_lora.adapters.writing.draft import Draft, Part

# Says by whose conventions A and B lie; up to 0.19.0 their roles were exchanged.
PEFT_VERSION = "0.21.0"
_IN_LAYER = re.compile(r"(?:model|language_model|model\.language_model|language_model\.model)\.layers\.\d+\.")
_KEPT = ("base_model_name_or_path", "revision", "task_type")


@dataclass(frozen=True)
class Says:
    """Which fields the readers of a layout, other systems' included, use besides `r` and `lora_alpha`.

    Attributes:
      rank_pattern: whether they use `rank_pattern`.
      alpha_pattern: whether they use `alpha_pattern`.
      rank_stabilised: whether they use `use_rslora`.
    """

    rank_pattern: bool
    alpha_pattern: bool
    rank_stabilised: bool


def settle(
    draft: Draft, parts: Sequence[Part], says: Says, all_targets: Iterable[str]
) -> tuple[list[Part], dict[str, Any]]:
    """The config of the parts, and the parts with whatever it cannot say of their scales folded into B.

    Args:
      draft: what the writers share.
      parts: what the file will hold.
      says: which fields the layout's readers use.
      all_targets: full names of everything in the model that could be a target.

    Raises:
      AdapterFormatError: a rank or scale that the config has no room for, by module.
    """
    rank, rank_patterns = _ranks(draft, parts, says)
    stabilised = _is_stabilised(draft, parts, says)
    alphas = [_alpha(part.rank, part.scale, stabilised) for part in parts]
    for part, alpha in zip(parts, alphas, strict=True):
        if abs(alpha) > MAX_ALPHA:
            raise draft.error(part.layer, part.module, f"its scale {part.scale:g} needs an alpha above {MAX_ALPHA:g}")
    alpha, alpha_patterns = _patterns(parts, alphas)
    if alpha_patterns and not says.alpha_pattern:
        parts, alpha_patterns = _with_one_alpha(draft, parts, alpha, stabilised), {}
    stacked = any(part.parameter and part.target.startswith(f"{draft.names.experts_path}.") for part in parts)
    modules = {part.full_target for part in parts if not part.parameter}
    parameters = {part.full_target for part in parts if part.parameter}
    shortest = _Shortest(set(all_targets), modules | parameters)
    config = {
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        **{name: draft.adapter.source[name] for name in _KEPT if draft.adapter.source.get(name) is not None},
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": stabilised,
        "rank_pattern": rank_patterns,
        "alpha_pattern": alpha_patterns,
        "target_modules": sorted({shortest(target) for target in modules}),
        "target_parameters": sorted({shortest(target, leaf=False) for target in parameters}) or None,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    if stacked and unsloth_field(config):  # whose older files have another order
        config["lora_B_layout"] = RANK_MAJOR
    return list(parts), config


def _ranks(draft: Draft, parts: Sequence[Part], says: Says) -> tuple[int, dict[str, int]]:
    rank, patterns = _patterns(parts, [part.rank for part in parts])
    if patterns and not says.rank_pattern:
        other = next(part for part in parts if part.rank != rank)
        problem = f"it has rank {other.rank} and other modules {rank}, and this layout has one rank for all"
        raise draft.error(other.layer, other.module, problem)
    return rank, patterns


def _is_stabilised(draft: Draft, parts: Sequence[Part], says: Says) -> bool:
    """`use_rslora`: what needs no more alphas than there is room for, then whole ones, then as the adapter's config."""
    if not says.rank_stabilised:
        return False
    source_says = bool(draft.adapter.source.get("use_rslora"))
    scales = {(part.rank, part.scale) for part in parts}

    def faults(stabilised: bool) -> tuple[bool, bool, bool]:
        alphas = {_alpha(rank, scale, stabilised) for rank, scale in scales}
        too_many = len(alphas) > 1 and not says.alpha_pattern
        return too_many, not all(isinstance(alpha, int) for alpha in alphas), stabilised is not source_says

    return min((False, True), key=faults)


def _divisor(rank: int, stabilised: bool) -> float:
    return math.sqrt(rank) if stabilised else rank


def _alpha(rank: int, scale: float, stabilised: bool) -> float:
    """The alpha that gives this float32 scale exactly: a whole number where one does."""
    exact = scale * _divisor(rank, stabilised)
    whole = round(exact)
    return whole if np.float32(whole / _divisor(rank, stabilised)) == np.float32(scale) else exact


def _with_one_alpha(draft: Draft, parts: Sequence[Part], alpha: float, stabilised: bool) -> list[Part]:
    settled = []
    for part in parts:
        scale = float(np.float32(alpha / _divisor(part.rank, stabilised)))
        if scale != part.scale:
            factor = part.scale / scale if scale else np.inf
            b = draft.folded(part.layer, part.module, part.b, scale, factor)
            part = replace(part, b=b, scale=scale)
        settled.append(part)
    return settled


def _patterns(parts: Sequence[Part], values: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the others by the widest regular expressions whose targets all have one value."""
    default = Counter(values).most_common(1)[0][0]
    values_of: dict[str, set[Any]] = {}
    for part, value in zip(parts, values, strict=True):
        for pattern in part.patterns:
            values_of.setdefault(pattern, set()).add(value)
    return default, {
        next(pattern for pattern in part.patterns if values_of[pattern] == {value}): value
        for part, value in zip(parts, values, strict=True)
        if value != default
    }


class _Shortest:
    """The shortest name that PEFT matches with targeted names alone: last part, path in all layers, or full name."""

    def __init__(self, all_targets: Iterable[str], targeted: Iterable[str]):
        self._all, self._targeted = self._count(all_targets), self._count(targeted)

    def __call__(self, full: str, leaf: bool = True) -> str:
        names = _suffixes(full) if leaf else _suffixes(full)[1:]
        return next(name for name in names if self._all[name] == self._targeted[name])

    def _count(self, targets: Iterable[str]) -> Mapping[str, int]:
        return Counter(name for full in targets for name in _suffixes(full))


def _suffixes(full: str) -> tuple[str, str, str]:
    below_layer = full if (inside := _IN_LAYER.match(full)) is None else full[inside.end() :]
    return full.rpartition(".")[2], below_layer, full
