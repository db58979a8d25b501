"""Qwen2-MoE: its `config.json`, and the names that its projections have in files."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.models.decoder_config import read_decoder
from jax_moe_lora.models.families.qwen import common, open_qwen
from jax_moe_lora.models.names import ATTENTION, DENSE_MLP, EXPERTS, ROUTER, SHARED_EXPERT
from jax_moe_lora.models.neutral_fields import QK_NORM, Values

MODEL_TYPE = "qwen2_moe"
ADAPTER_NAMES = AdapterNames(
    dense=ATTENTION | ROUTER | DENSE_MLP | SHARED_EXPERT, experts=EXPERTS, experts_path="mlp.experts"
)

# What the class in transformers does whatever its config says.
NEUTRAL: Values = dict.fromkeys(QK_NORM, (False,))


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_qwen(raw, source, NEUTRAL)
    return read_decoder(
        fields,
        generation,
        model_type=MODEL_TYPE,
        **common(fields),
        shared_expert_width=fields.size("shared_expert_intermediate_size"),
        qk_norm=None,
        attention_biases="qkv" if fields.flag("qkv_bias", True) else "",  # early configs have no such field
    )
