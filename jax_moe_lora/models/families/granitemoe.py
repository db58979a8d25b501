"""Granite 3.0 and 3.1 with routed experts."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields
from jax_moe_lora.models.families.granite import NEUTRAL, granite_family, read_granite
from jax_moe_lora.models.specs.model import ModelConfig


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    return read_granite(open_fields(raw, source, NEUTRAL), generation, None, "granitemoe")


FAMILY = granite_family("granitemoe", read_config)
