"""The config of a checkpoint folder."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jax_moe_lora.errors import ConfigError
from jax_moe_lora.files.safetensors_io import read_json
from jax_moe_lora.models.families.registry import family, wrapped
from jax_moe_lora.models.fields import QUANTISED
from jax_moe_lora.models.specs.model import ModelConfig


def read_model_config(folder: Path) -> ModelConfig:
    """The model's config: `config.json`, and where they stand `generation_config.json` and `hf_quant_config.json`.

    Raises:
      ConfigError: a file or field that is missing, malformed, not supported or not understood, by name.
    """
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        message = f"{folder} holds an adapter, not a model; load it into its base model under a name."
        raise ConfigError(message, file=folder / "config.json", found="adapter_config.json", expected="config.json")
    if not os.path.lexists(folder / "config.json"):
        message = f"{folder} has no config.json; give the folder of a model: config.json and safetensors files."
        raise ConfigError(message, file=folder / "config.json", found="no such file", expected="config.json")
    raw = read_json(folder / "config.json", ConfigError)
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file, ConfigError) if os.path.lexists(generation_file) else None
    return parse_model_config(raw | _quantisation_beside(folder, raw), generation, str(folder / "config.json"))


def _quantisation_beside(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What Model Optimizer writes into a file of its own: the `quantization_config` of configs that have none.

    Source: hf_quant_config.json of checkpoints such as nvidia/DeepSeek-R1-FP4.
    """
    path = folder / "hf_quant_config.json"
    if any(raw.get(name) for name in QUANTISED) or not os.path.lexists(path):
        return {}
    content = read_json(path, ConfigError)
    settings = content.get("quantization")
    if not isinstance(settings, dict):
        message = f"{path} has quantization {settings!r}; expected an object, as Model Optimizer writes it."
        raise ConfigError(message, file=path, key="quantization", found=repr(settings), expected="an object")
    if settings.get("quant_algo") is None:  # of the cache alone, say
        return {}
    return {QUANTISED[0]: {"quant_method": "modelopt", "producer": content.get("producer")} | settings}


def parse_model_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None, source: str = "config.json"
) -> ModelConfig:
    """The model's config, of what its files say.

    Args:
      raw: `config.json`.
      generation: `generation_config.json`, where there is one.
      source: what errors call the first.

    Raises:
      ConfigError: a field that is missing, malformed, not supported or not understood, by name.
    """
    text = wrapped(raw, source)
    config = family(text.get("model_type"), source, text).read_config(text, generation, source)
    return config if text is raw else replace(config, wrapped=True)
