"""Qwen3-MoE."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import read_gqa, read_model, read_norm
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.qwen import open_qwen, read_qwen_layers
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.model import ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = dict.fromkeys(QK_NORM, (True,)) | dict.fromkeys(QKV_BIAS, (False,))


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_qwen(raw, source, NEUTRAL)
    norm = read_norm(fields, 1e-6)
    biases = "qkvo" if fields.flag("attention_bias", False) else ""
    attention = read_gqa(fields, norm=norm, qk_norm="head", biases=biases)
    return read_model(fields, generation, read_qwen_layers(fields, attention, norm), model_type="qwen3_moe")


FAMILY = Family("qwen3_moe", read_config, refuses="windows")
