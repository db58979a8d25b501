"""`adapter_config.json`, which all layouts have: a field that changes the arithmetic is used or refused."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from jax_moe_lora.adapters.formats import config_fields
from jax_moe_lora.adapters.formats.config_fields import Malformed, shown
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.safetensors_io import read_json

CONFIG = "adapter_config.json"
# Every field of peft 0.21's LoraConfig is used by `PeftConfig`, harmless (below), or refused where it is set.
_HARMLESS = frozenset(
    {
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
        "eva_config",
        "peft_version",
        "peft_type",
    }
)
_USED = frozenset(
    {
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "init_lora_weights",
    }
)
_REFUSED = {
    "use_dora": "DoRA is not supported",
    "modules_to_save": "whole modules saved beside the adapter are not supported",
    "lora_bias": "biases of LoRA matrices are not supported",
    "fan_in_fan_out": "weights stored transposed (fan_in_fan_out) are not supported",
    "trainable_token_indices": "trained token embeddings are not supported",
    "layer_replication": "replicated layers are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "use_qalora": "QA-LoRA pools its inputs and is not supported",
}
_TARGETING = frozenset(
    {"target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"}
)
# Initialisations that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


Value = TypeVar("Value")


@dataclass(frozen=True)
class PeftConfig:
    """The part of a PEFT config that decides what an adapter computes.

    Attributes:
      rank, alpha, rank_patterns, alpha_patterns: as `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`.
      peft_version: that wrote the file, where it says so.
      raw: the whole object.
      malformed: fields above whose value means nothing; only in a config whose problems were kept.
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
    peft_version: tuple[int, ...] | None
    raw: Mapping[str, Any]
    malformed: frozenset[str] = frozenset()

    def error(self, problem: str, key: str = "", found: object = "", expected: str = "") -> AdapterFormatError:
        return AdapterFormatError(f"{self.file}: {problem}.", file=self.file, key=key, found=found, expected=expected)

    @property
    def says_ranks(self) -> bool:
        return not self.malformed & {"r", "rank_pattern"}

    @property
    def says_scale(self) -> bool:
        return not self.malformed & {"lora_alpha", "alpha_pattern"}

    @property
    def says_targets(self) -> bool:
        return not self.malformed & _TARGETING

    def rank_and_scale(self, *keys: str) -> tuple[int, float]:
        """Rank of a module (or `module.parameter`) by its full names, and the factor on its update."""
        rank = self.rank_patterns.get(_first_match(self.rank_patterns, keys), self.rank)
        alpha = self.alpha_patterns.get(_first_match(self.alpha_patterns, keys), self.alpha)
        return rank, alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def targets(self, key: str) -> bool:
        return self.targets_module(key) or self.targets_parameter(key)

    def targets_parameter(self, key: str) -> bool:
        return any(_ends_with(key, target) for target in self.target_parameters)

    def targets_module(self, key: str) -> bool:
        """Whether PEFT would put an adapter on the module of this name (its `check_target_module_exists`).

        A config without targets, as Tinker's may be, excludes nothing.
        """
        if isinstance(self.exclude_modules, str):
            if self.exclude_modules and re.fullmatch(self.exclude_modules, key):
                return False
        elif any(_ends_with(key, name) for name in self.exclude_modules):
            return False
        if not self.target_modules and not self.target_parameters:
            return True
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == "all-linear" or re.fullmatch(self.target_modules, key) is not None
        if key in self.target_modules:
            return True
        return any(key.endswith(f".{name}") for name in self.target_modules) and self._layer_is_targeted(key)

    def _layer_is_targeted(self, key: str) -> bool:
        if self.layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in self.layers_patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        match = next((found for pattern in patterns if (found := re.match(pattern, key))), None)
        return match is not None and int(match["idx"]) in self.layers


def read_peft_config(folder: Path, problems: Problems | None = None) -> PeftConfig:
    """Reads and checks `adapter_config.json`.

    Raises:
      AdapterFormatError: it is missing, malformed, not of LoRA, or sets a field that is not supported, by name.
    """
    problems = problems or Problems()
    config = describe_peft_config(folder, problems)
    for name, value in config.raw.items():
        if name in _HARMLESS or name in _USED or value in (None, False, [], {}, ""):
            continue
        why = _REFUSED.get(name, "it is not understood and may change the result")
        with problems:
            raise config.error(f"{name} is {shown(value)}: {why}", name, shown(value), "no such setting")
    with problems:
        if config.raw.get("lora_alpha") is None and "lora_alpha" not in config.malformed:
            why = "lora_alpha is missing, and without it the scale is not known"
            raise config.error(why, "lora_alpha", "nothing", "a number")
    bias, init = config.raw.get("bias", "none"), config.raw.get("init_lora_weights", True)
    with problems:
        if bias not in (None, "none"):
            raise config.error(f"bias is {shown(bias)}: trained biases are not supported", "bias", bias, "'none'")
    with problems:
        if init not in _PLAIN_INITS:
            why = f"init_lora_weights is {shown(init)}: it changes the base weights; convert it with PEFT"
            raise config.error(why, "init_lora_weights", shown(init), "an initialisation that leaves them alone")
    return config


def describe_peft_config(folder: Path, problems: Problems | None = None) -> PeftConfig:
    """Reads `adapter_config.json` without refusing what is only not supported: to look at, not to serve.

    Raises:
      AdapterFormatError: it is missing, not of LoRA, or a field of `PeftConfig` is malformed, by name.
    """
    file, problems = folder / CONFIG, problems or Problems()
    raw: dict[str, Any] = {}
    malformed: set[str] = {"r", "lora_alpha", *_TARGETING}
    with problems:
        if not file.exists() and (folder / "config.json").exists():
            why = f"{folder} holds a model, not an adapter; give a folder with {file.name}."
            raise AdapterFormatError(why, file=file, found="config.json", expected=file.name)
        raw = read_json(file, AdapterFormatError)
        malformed = set()
    unreadable = frozenset(malformed)

    def field(name: str, read: Callable[[Mapping[str, Any], str], Value], default: Value) -> Value:
        with problems:
            if name not in unreadable:
                try:
                    return read(raw, name)
                except Malformed as bad:
                    why, expected = str(bad), bad.expected
                    raise AdapterFormatError(
                        f"{file}: {why}.", file=file, key=name, found=shown(raw.get(name)), expected=expected
                    ) from None
        malformed.add(name)
        return default

    field("peft_type", config_fields.lora, None)
    no_names: str | list[str] = []
    config = PeftConfig(
        file=file,
        rank=field("r", config_fields.rank, 1),
        alpha=field("lora_alpha", config_fields.alpha, 1.0),
        rank_stabilised=field("use_rslora", config_fields.flag, False),
        rank_patterns=field("rank_pattern", config_fields.rank_patterns, {}),
        alpha_patterns=field("alpha_pattern", config_fields.alpha_patterns, {}),
        target_modules=field("target_modules", config_fields.names, no_names),
        target_parameters=field("target_parameters", config_fields.listed_names, []),
        exclude_modules=field("exclude_modules", config_fields.names, no_names),
        layers=field("layers_to_transform", config_fields.layers, None),
        layers_patterns=field("layers_pattern", config_fields.layer_patterns, []),
        peft_version=_version(raw.get("peft_version")),
        raw=raw,
    )
    return replace(config, malformed=frozenset(malformed))


def _first_match(patterns: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((p for p in patterns if any(pattern_matches(p, key) for key in keys)), "")


def pattern_matches(pattern: str, key: str) -> bool:
    """Whether PEFT uses this pattern's rank or alpha for the module of this name."""
    return re.match(rf"(.*\.)?({pattern})$", key) is not None


def _ends_with(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _version(text: Any) -> tuple[int, ...] | None:
    """None where it is not known; development versions around the fix may lie on either side of it."""
    match = re.match(r"([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})", str(text))
    if match is None or re.match(r"0\.(19\.1|20\.0)\.?dev", str(text)):
        return None
    return tuple(map(int, match.groups()))
