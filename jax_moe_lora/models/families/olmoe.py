"""OLMoE: its `config.json`, and the names that its projections have in files."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.models.decoder_config import open_fields, read_decoder, read_layers, read_moe
from jax_moe_lora.models.names import ATTENTION, EXPERTS, ROUTER
from jax_moe_lora.models.neutral_fields import QK_NORM, Values

MODEL_TYPE = "olmoe"
ADAPTER_NAMES = AdapterNames(dense=ATTENTION | ROUTER, experts=EXPERTS, experts_path="mlp.experts")

# What the class in transformers does whatever its config says.
NEUTRAL: Values = dict.fromkeys(QK_NORM, (True,))


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL)
    return read_decoder(
        fields,
        generation,
        model_type=MODEL_TYPE,
        moe=read_moe(fields, "intermediate_size", fields.flag("norm_topk_prob", False)),
        moe_layers=(True,) * read_layers(fields),
        mlp_width=0,
        qk_norm="projection",
        attention_biases="qkvo" if fields.flag("attention_bias", False) else "",
        clip_qkv=fields.optional_positive("clip_qkv"),
        default_eps=1e-5,
    )
