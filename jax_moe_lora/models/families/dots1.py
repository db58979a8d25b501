"""dots.llm1."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_activation, read_gqa, read_model, read_norm
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.routed_experts import SIGMOID, read_sigmoid_routed
from jax_moe_lora.models.families.windows import read_windows
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.mlp import DenseMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = {**SIGMOID, **dict.fromkeys(QK_NORM, (True,)), **dict.fromkeys(QKV_BIAS, (False,))}
# Windows are switched on by `layer_types`, or by `max_window_layers` and `sliding_window`.
ANY_VALUE = ("use_sliding_window",)


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL, ANY_VALUE)
    norm = read_norm(fields, 1e-6)
    attention = read_gqa(
        fields, norm=norm, qk_norm="head", biases="qkvo" if fields.flag("attention_bias", False) else ""
    )
    routed = read_sigmoid_routed(
        fields, ("n_routed_experts", "num_local_experts"), "n_shared_experts", renormalize=False, scaling=1.0
    )
    first_routed = fields.count("first_k_dense_replace", 0)
    full = fields.size("max_window_layers", 62)
    windows = read_windows(fields, lambda layer: fields.get("sliding_window") is not None and layer >= full)
    dense = DenseMLP(fields.size("intermediate_size"), read_activation(fields))
    layers = [
        LayerSpec(replace(attention, window=window), routed if layer >= first_routed else dense, norm)
        for layer, window in enumerate(windows)
    ]
    return read_model(fields, generation, layers, model_type="dots1")


FAMILY = Family("dots1", read_config)
