"""Arcee Trinity."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax_moe_lora.models.decoder_config import (
    open_fields,
    read_activation,
    read_gqa,
    read_model,
    read_moe,
    read_norm,
)
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.windows import read_windows
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = {
    "route_norm": (True,),
    "score_func": ("sigmoid",),
    **dict.fromkeys(QK_NORM, (True,)),
    **dict.fromkeys(QKV_BIAS, (False,)),
}
# A loss of training, how experts are run, and groups of experts, which the class has fields for and does not make.
_GROUPS = ("n_group", "topk_group", "num_expert_groups", "num_limited_groups")
ANY_VALUE = ("load_balance_coeff", "use_grouped_mm", *_GROUPS)


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL, ANY_VALUE)
    norm = read_norm(fields, 1e-5, wide=True)
    attention = read_gqa(
        fields,
        norm=norm,
        qk_norm="head",
        gate="projection",
        biases="qkvo" if fields.flag("attention_bias", False) else "",
    )
    moe = read_moe(
        fields,
        "moe_intermediate_size",
        renormalize=True,
        router="sigmoid_bias",
        scaling=fields.positive("route_scale", 1.0),
    )
    activation = read_activation(fields)
    width = moe.expert_width * fields.size("num_shared_experts", 2)
    shared = DenseMLP(width, activation, "shared", "mlp.shared_experts")
    routed = RoutedMLP(moe, choice_bias=True, shared=shared)
    dense = DenseMLP(fields.size("intermediate_size"), activation)
    first_routed = fields.count("num_dense_layers", 1)
    step = fields.size("global_attn_every_n_layers", 4)
    windows = read_windows(fields, lambda layer: (layer + 1) % step != 0)
    layers = [
        LayerSpec(
            # Layers that see everything have no positions.
            replace(attention, window=window, rope=attention.rope if window else None),
            routed if layer >= first_routed else dense,
            norm,
            norms="both",
        )
        for layer, window in enumerate(windows)
    ]
    embedding_scale = fields.size("hidden_size") ** 0.5 if fields.flag("mup_enabled", False) else 1.0
    return read_model(fields, generation, layers, model_type="afmoe", embedding_scale=embedding_scale)


FAMILY = Family(
    "afmoe",
    read_config,
    paths={
        "router": ("mlp.router.gate.weight",),
        "choice_bias": ("mlp.expert_bias",),
        "mlp_norm": ("pre_mlp_layernorm.weight",),
        "mlp_post_norm": ("post_mlp_layernorm.weight",),
    },
)
