"""The part of `adapter_config.json` that decides what an adapter computes, in PEFT's own terms."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jax_moe_lora.adapters.formats.config_fields import MIXED
from jax_moe_lora.adapters.formats.names import WRAPPED, without_prefix
from jax_moe_lora.adapters.formats.patterns import NameSet, PatternTable
from jax_moe_lora.errors import AdapterFormatError

CONFIG = "adapter_config.json"
TARGETING = frozenset(
    {"target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"}
)
"""The fields that say which modules have an adapter."""


@dataclass(frozen=True)
class PeftConfig:
    """A LoRA config of PEFT: ranks and scales by module, and which modules have an adapter.

    Attributes:
      file: where it was read, which errors name.
      rank: `r`.
      alpha: `lora_alpha`.
      rank_stabilised: `use_rslora`: the scale is alpha / sqrt(rank).
      rank_patterns: `rank_pattern`.
      alpha_patterns: `alpha_pattern`.
      target_modules: names, or one regular expression, or `all-linear`.
      target_parameters: names of 3-D and 2-D parameters.
      exclude_modules: names, or one regular expression.
      layers: `layers_to_transform`; None for all of them.
      layers_patterns: `layers_pattern`.
      token_ids: `trainable_token_indices`: path of embedding or head -> the tokens whose rows are replaced.
      saved_modules: `modules_to_save`: paths of embedding and head that are replaced as a whole.
      b_layout: `lora_B_layout`, Unsloth's note on the columns of a 3-D parameter's B.
      b_layouts: the same by parameter.
      peft_version: the release of PEFT that wrote the file; None where that is not known.
      raw: the whole object.
      malformed: fields above with an invalid value; only in a config whose problems were kept.
    """

    file: Path
    rank: int
    alpha: float
    rank_stabilised: bool
    rank_patterns: Mapping[str, int]
    alpha_patterns: Mapping[str, float]
    target_modules: str | Sequence[str]
    target_parameters: Sequence[str]
    exclude_modules: str | Sequence[str]
    layers: frozenset[int] | None
    layers_patterns: Sequence[str]
    token_ids: Mapping[str, Sequence[int]]
    saved_modules: frozenset[str]
    b_layout: str | None
    b_layouts: Mapping[str, str]
    peft_version: tuple[int, ...] | None
    raw: Mapping[str, Any]
    malformed: frozenset[str] = frozenset()

    def error(self, problem: str, key: str = "", found: object = "", expected: str = "") -> AdapterFormatError:
        """An error to raise.

        Args:
          problem: the sentence, without its full stop.
          key: the field.
          found: what it holds.
          expected: what it should hold.
        """
        return AdapterFormatError(f"{self.file}: {problem}.", file=self.file, key=key, found=found, expected=expected)

    @property
    def says_ranks(self) -> bool:
        return not self.malformed & {"r", "rank_pattern"}

    @property
    def says_scale(self) -> bool:
        return not self.malformed & {"lora_alpha", "alpha_pattern"}

    @property
    def says_targets(self) -> bool:
        return not self.malformed & TARGETING

    @property
    def ties_saved_modules(self) -> bool:
        """Whether a module that is saved as a whole is embedding and head at once, where the base model ties them."""
        return bool(self.saved_modules and self.raw.get("ensure_weight_tying"))

    @property
    def replaced_modules(self) -> frozenset[str]:
        """Paths of embedding and head of which the file may hold whole matrices that are no copies."""
        return frozenset(("model.embed_tokens", "lm_head")) if self.ties_saved_modules else self.saved_modules

    @cached_property
    def rank_table(self) -> PatternTable:
        return PatternTable(self.rank_patterns)

    @cached_property
    def alpha_table(self) -> PatternTable:
        return PatternTable(self.alpha_patterns)

    @cached_property
    def _module_names(self) -> frozenset[str]:
        return frozenset(() if isinstance(self.target_modules, str) else self.target_modules)

    @cached_property
    def _module_suffixes(self) -> NameSet:
        return NameSet(self._module_names)

    @cached_property
    def _parameter_suffixes(self) -> NameSet:
        return NameSet(self.target_parameters)

    @cached_property
    def _excluded_suffixes(self) -> NameSet:
        return NameSet(() if isinstance(self.exclude_modules, str) else self.exclude_modules)

    def rank_and_scale(self, *keys: str) -> tuple[int, float]:
        """Rank of a module (or `module.parameter`) by its full names, and the factor on its update."""
        rank, alpha = self.rank_table.value(keys, self.rank), self.alpha_table.value(keys, self.alpha)
        return rank, alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def targets(self, key: str) -> bool:
        return self.targets_module(key) or self.targets_parameter(key)

    def targets_parameter(self, key: str) -> bool:
        return key in self._parameter_suffixes

    def targets_module(self, key: str) -> bool:
        """Whether PEFT would put an adapter on the module of this name (its `check_target_module_exists`).

        A config without targets, as Tinker's may be, excludes nothing but what it saves as a whole.
        """
        if self.saved_modules and without_prefix(key, WRAPPED) in self.saved_modules:
            return False
        if isinstance(self.exclude_modules, str):
            if self.exclude_modules and re.fullmatch(self.exclude_modules, key):
                return False
        elif key in self._excluded_suffixes:
            return False
        if not self.target_modules and not self.target_parameters:
            return True
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == "all-linear" or re.fullmatch(self.target_modules, key) is not None
        return key in self._module_names or (key in self._module_suffixes and self._layer_is_targeted(key))

    def _layer_is_targeted(self, key: str) -> bool:
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in self.layers_patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        match = next((found for pattern in patterns if (found := re.match(pattern, key))), None)
        return match is not None and int(match["idx"]) in self.layers

    def b_layout_of(self, parameter: str) -> str | None:
        """The order that the config gives for the columns of a 3-D parameter's B; None where it says nothing.

        Raises:
          AdapterFormatError: it contradicts itself, or says that orders differ and not what this one is.
        """
        general, specific = self.b_layout, self.b_layouts.get(parameter)
        if specific is None and general != MIXED:
            return general
        if specific in (None, MIXED) or general not in (None, MIXED, specific):
            problem = f"lora_B_layout is {general}, and the note on {parameter} says {specific or 'nothing'}"
            raise self.error(problem, "lora_B_layout", f"{general} and {specific or 'nothing'}", "one order")
        return specific
