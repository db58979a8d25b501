"""`adapter_config.json`, which all layouts have: a field that changes the arithmetic is used or refused."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.safetensors_io import read_json

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
# Far past any real adapter; within them a rank indexes and a scale stays finite in float32.
MAX_RANK, MAX_ALPHA = 2**20, 1e30
# Initialisations that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them.
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftConfig:
    """The part of a PEFT config that decides what an adapter computes.

    Attributes:
      rank, alpha, rank_patterns, alpha_patterns: as `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`.
      peft_version: that wrote the file, where it says so.
      raw: the whole object.
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

    def error(self, problem: str) -> AdapterFormatError:
        return AdapterFormatError(f"{self.file}: {problem}.")

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


def read_peft_config(folder: Path) -> PeftConfig:
    """Reads and checks `adapter_config.json`.

    Raises:
      AdapterFormatError: it is missing, malformed, not of LoRA, or sets a field that is not supported, by name.
    """
    config = describe_peft_config(folder)
    raw, bad = config.raw, config.error
    for name, value in raw.items():
        if name in _HARMLESS or name in _USED or value in (None, False, [], {}, ""):
            continue
        raise bad(f"{name} is {value!r}: {_REFUSED.get(name, 'it is not understood and may change the result')}")
    if raw.get("lora_alpha") is None:
        raise bad("lora_alpha is missing, and without it the scale is not known")
    if raw.get("bias", "none") not in (None, "none"):
        raise bad(f"bias is {raw['bias']!r}: trained biases are not supported")
    if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise bad(
            f"init_lora_weights is {raw['init_lora_weights']!r}: it changes the base weights; convert it with PEFT"
        )
    return config


def describe_peft_config(folder: Path) -> PeftConfig:
    """Reads `adapter_config.json` without refusing what is only not supported: to look at, not to serve.

    Raises:
      AdapterFormatError: it is missing, not of LoRA, or a field of `PeftConfig` is malformed, by name.
    """
    file = folder / "adapter_config.json"
    if not file.exists() and (folder / "config.json").exists():
        raise AdapterFormatError(f"{folder} holds a model, not an adapter; give a folder with {file.name}.")
    raw = read_json(file, AdapterFormatError)

    def bad(problem: str) -> AdapterFormatError:
        return AdapterFormatError(f"{file}: {problem}.")

    if str(raw.get("peft_type", "LORA")).upper() != "LORA":
        raise bad(f"peft_type is {raw['peft_type']!r}, only LORA is supported")
    layers = raw.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    return PeftConfig(
        file=file,
        rank=_whole(raw, "r", bad),
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha", bad),
        rank_stabilised=_flag(raw.get("use_rslora"), "use_rslora", bad),
        rank_patterns={k: _whole(_object(raw, "rank_pattern", bad), k, bad) for k in _object(raw, "rank_pattern", bad)},
        alpha_patterns={
            k: _number(v, f"alpha_pattern[{k!r}]", bad) for k, v in _object(raw, "alpha_pattern", bad).items()
        },
        target_modules=_names(raw, "target_modules", bad),
        target_parameters=_names(raw, "target_parameters", bad, lists_only=True),
        exclude_modules=_names(raw, "exclude_modules", bad),
        layers=None if not layers else frozenset(_layers(layers, bad)),
        layers_patterns=_layer_patterns(raw, bad),
        peft_version=_version(raw.get("peft_version")),
        raw=raw,
    )


def _first_match(patterns: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((p for p in patterns if any(re.match(rf"(.*\.)?({p})$", key) for key in keys)), "")


def _ends_with(key: str, name: str) -> bool:
    return key == name or key.endswith(f".{name}")


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) and names else names or []


def _whole(raw: Mapping[str, Any], name: str, bad) -> int:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise bad(f"{name} is {value!r}, a whole number from 1 to {MAX_RANK} was expected")
    return value


def _flag(value: Any, name: str, bad) -> bool:
    if not isinstance(value, bool | None):
        raise bad(f"{name} is {value!r}, true or false was expected")
    return bool(value)


def _number(value: Any, name: str, bad) -> float:
    # A comparison, not isfinite: an integer of 400 digits has no float. NaN fails it too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise bad(f"{name} is {value!r}, a number of at most {MAX_ALPHA:g} was expected")
    return float(value)


def _object(raw: Mapping[str, Any], name: str, bad) -> dict[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise bad(f"{name} is {value!r}, an object was expected")
    for pattern in value:
        _compile(pattern, name, bad)
    return value


def _names(raw: Mapping[str, Any], name: str, bad, lists_only: bool = False) -> str | list[str]:
    value = raw.get(name) or []
    if isinstance(value, str) and not lists_only:
        _compile(value, name, bad)
        return value
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise bad(f"{name} is {value!r}, a list of names was expected")
    return value


def _compile(pattern: str, name: str, bad) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise bad(f"{name} holds {pattern!r}, which is no regular expression: {error}") from error


def _layer_patterns(raw: Mapping[str, Any], bad) -> Sequence[str]:
    patterns = _listed(_names(raw, "layers_pattern", bad))
    for pattern in patterns:
        _compile(pattern, "layers_pattern", bad)
    return patterns


def _layers(values: Any, bad) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise bad(f"layers_to_transform is {values!r}, a layer or a list of layers was expected")
    return values


def _version(text: Any) -> tuple[int, ...] | None:
    """None where it is not known; development versions around the fix may lie on either side of it."""
    match = re.match(r"([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})", str(text))
    if match is None or re.match(r"0\.(19\.1|20\.0)\.?dev", str(text)):
        return None
    return tuple(map(int, match.groups()))
