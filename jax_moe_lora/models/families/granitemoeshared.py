"""Granite with routed experts and a shared one."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_activation
from jax_moe_lora.models.families.granite import NEUTRAL, granite_family, read_granite
from jax_moe_lora.models.specs.fused_mlp import FusedMLP
from jax_moe_lora.models.specs.model import ModelConfig


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL)
    width = fields.count("shared_intermediate_size", 0)
    shared = FusedMLP(width, read_activation(fields)) if width else None
    return read_granite(fields, generation, shared, "granitemoeshared")


FAMILY = granite_family("granitemoeshared", read_config)
