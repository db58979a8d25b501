"""Solar Open."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_gqa, read_layers, read_model, read_norm
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.routed_experts import SIGMOID, read_sigmoid_routed
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = {**SIGMOID, **dict.fromkeys((*QK_NORM, *QKV_BIAS), (False,))}
# Every layer is routed, and none has a window.
ANY_VALUE = ("intermediate_size", "first_k_dense_replace", "sliding_window")


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL, ANY_VALUE)
    norm = read_norm(fields, 1e-5)
    # The last projection of attention never has a bias.
    attention = read_gqa(fields, 1e6, biases="qkv" if fields.flag("attention_bias", False) else "")
    routed = read_sigmoid_routed(
        fields, ("n_routed_experts", "num_local_experts"), "n_shared_experts", renormalize=True, scaling=1.0
    )
    count = read_layers(fields)
    fields.expect_all("layer_types", "full_attention", count)
    return read_model(fields, generation, [LayerSpec(attention, routed, norm)] * count, model_type="solar_open")


FAMILY = Family("solar_open", read_config)
