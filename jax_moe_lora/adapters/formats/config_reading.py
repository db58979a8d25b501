"""Reads `adapter_config.json`: a field that changes the arithmetic is used or refused, by name."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from jax_moe_lora.adapters.formats import config_fields
from jax_moe_lora.adapters.formats.config_fields import Malformed, shown
from jax_moe_lora.adapters.formats.look_around import missing_config
from jax_moe_lora.adapters.formats.neutral_fields import PLAIN_INITS, REFUSED, is_neutral, says_nothing
from jax_moe_lora.adapters.formats.peft_config import CONFIG, TARGETING, PeftConfig
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.safetensors_io import read_json

Value = TypeVar("Value")
# Read by `PeftConfig`, or by `_check` below.
USED = TARGETING | {
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "lora_B_layout",
    "unsloth_fused_expert_lora",
    "bias",
    "init_lora_weights",
    "trainable_token_indices",
    "modules_to_save",
}


def read_peft_config(folder: Path, problems: Problems | None = None) -> PeftConfig:
    """Reads and checks `adapter_config.json`.

    Args:
      folder: the adapter's.
      problems: what becomes of a problem; None raises the first.

    Raises:
      AdapterFormatError: it is missing, malformed, not of LoRA, or sets a field that is not supported, by name.
    """
    problems = problems or Problems()
    config = describe_peft_config(folder, problems)
    _check(config, problems)
    return config


def describe_peft_config(folder: Path, problems: Problems | None = None) -> PeftConfig:
    """Reads `adapter_config.json` without refusing what is only not supported: to look at, not to serve.

    Args:
      folder: the adapter's.
      problems: what becomes of a problem; None raises the first.

    Raises:
      AdapterFormatError: it is missing, not of LoRA, or a field of `PeftConfig` is malformed, by name.
    """
    file, problems = folder / CONFIG, problems or Problems()
    with problems:
        if not os.path.lexists(file):
            raise missing_config(folder)
        return _parse(read_json(file, AdapterFormatError), file, problems)
    return replace(_parse({}, file, Problems(keep=True)), malformed=frozenset({"r", "lora_alpha", *TARGETING}))


def peft_config_of(fields: Mapping[str, Any], source: str, problems: Problems) -> PeftConfig:
    """A config that stands in no file yet, checked as one that does.

    Args:
      fields: as in `adapter_config.json`.
      source: what errors call it.
      problems: what becomes of a problem.

    Raises:
      AdapterFormatError: as `read_peft_config`.
    """
    config = _parse(fields, Path(source), problems)
    _check(config, problems)
    return config


def _check(config: PeftConfig, problems: Problems) -> None:
    """Refuses what would change the result and is not used."""
    raw = config.raw
    for name, value in raw.items():
        if name not in USED and not is_neutral(name, value):
            why = REFUSED.get(name, "it is not understood and may change the result")
            with problems:
                raise config.error(f"{name} is {shown(value)}: {why}", name, shown(value), "no such setting")
    with problems:
        if others := config_fields.other_saved_modules(raw):
            why = (
                f"modules_to_save names {shown(others[0])}: of whole modules embed_tokens and lm_head alone are served"
            )
            why += "; train LoRA on others (target_modules)"
            raise config.error(why, "modules_to_save", shown(others[0]), "embed_tokens or lm_head")
    with problems:
        if raw.get("lora_alpha") is None and "lora_alpha" not in config.malformed:
            why = "lora_alpha is missing, and without it the scale is not known"
            raise config.error(why, "lora_alpha", "nothing", "a number")
    bias, init = raw.get("bias", "none"), raw.get("init_lora_weights", True)
    with problems:
        if bias != "none" and not says_nothing(bias):
            raise config.error(f"bias is {shown(bias)}: trained biases are not supported", "bias", bias, "'none'")
    with problems:
        if (init.lower() if isinstance(init, str) else init) not in PLAIN_INITS:
            why = f"init_lora_weights is {shown(init)}: it changes the base weights; convert it with PEFT"
            raise config.error(why, "init_lora_weights", shown(init), "an initialisation that leaves them alone")


def _parse(raw: Mapping[str, Any], file: Path, problems: Problems) -> PeftConfig:
    """The fields of a config; one with an invalid value has a default in a config whose problems are kept."""
    malformed: set[str] = set()

    def field(name: str, read: Callable[[Mapping[str, Any], str], Value], default: Value) -> Value:
        with problems:
            try:
                return read(raw, name)
            except Malformed as bad:
                why, found = f"{file}: {bad}.", shown(raw.get(name))
                raise AdapterFormatError(why, file=file, key=name, found=found, expected=bad.expected) from None
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
        token_ids=field("trainable_token_indices", config_fields.token_ids, {}),
        saved_modules=field("modules_to_save", config_fields.saved_modules, frozenset()),
        b_layout=field("lora_B_layout", config_fields.b_layout, None),
        b_layouts=field("unsloth_fused_expert_lora", config_fields.b_layouts, {}),
        peft_version=_version(raw.get("peft_version")),
        raw=raw,
    )
    return replace(config, malformed=frozenset(malformed))


def _version(text: Any) -> tuple[int, ...] | None:
    """None where it is not known; development versions around the fix may lie on either side of it."""
    match = re.match(r"([0-9]{1,9})\.([0-9]{1,9})\.([0-9]{1,9})", str(text))
    if match is None or re.match(r"0\.(19\.1|20\.0)\.?dev", str(text)):
        return None
    return tuple(map(int, match.groups()))
