"""Ernie 4.5 with routed experts, the text models."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax_moe_lora.models.decoder_config import (
    open_fields,
    read_activation,
    read_gqa,
    read_layers,
    read_model,
    read_moe,
    read_norm,
)
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.rope_config import read_rope
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = {"moe_gate": ("topk",), "use_rmsnorm": (True,), **dict.fromkeys((*QK_NORM, *QKV_BIAS), (False,))}
# What training did, and layers that predict further tokens, which are not read.
ANY_VALUE = ("moe_capacity", "moe_use_aux_free", "num_nextn_predict_layers")


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields({"tie_word_embeddings": True} | dict(raw), source, NEUTRAL, ANY_VALUE)
    norm, activation = read_norm(fields, 1e-5), read_activation(fields)
    biases = fields.flag("use_bias", False)
    rope = replace(read_rope(fields, fields.size("max_position_embeddings"), 5e5), interleaved=True)
    attention = read_gqa(fields, rope=rope, norm=norm, biases="qkvo" if biases else "")
    moe = read_moe(
        fields,
        "moe_intermediate_size",
        renormalize=True,
        experts_names=("moe_num_experts", "num_experts"),
        top_k_name="moe_k",
        router="softmax_bias",
        renormalize_floor=fields.positive("moe_norm_min", 1e-12),
    )
    width = moe.expert_width * fields.count("moe_num_shared_experts", 2)
    shared = DenseMLP(width, activation, "shared", "mlp.shared_experts", biases) if width else None
    routed = RoutedMLP(moe, router_float32=True, choice_bias=True, choice_bias_row=True, shared=shared)
    dense = DenseMLP(fields.size("intermediate_size"), activation, biases=biases)
    layers = [LayerSpec(attention, routed if here else dense, norm) for here in _read_routed_layers(fields)]
    return read_model(fields, generation, layers, model_type="ernie4_5_moe", head_bias=biases)


def _read_routed_layers(fields: Fields) -> list[bool]:
    """Which layers are routed: each `moe_layer_interval`-th from a first to a last one, which -1 stands for too."""
    count, step = read_layers(fields), fields.size("moe_layer_interval", 1)
    first = fields.count("moe_layer_start_index", 1)
    last = count - 1 if fields.get("moe_layer_end_index", -1) == -1 else fields.count("moe_layer_end_index", 0)
    return [(layer + 1) % step == 0 and first <= layer <= last for layer in range(count)]


_BIAS = "moe_statics.e_score_correction_bias"
FAMILY = Family(
    "ernie4_5_moe",
    read_config,
    paths={"choice_bias": (f"mlp.gate.{_BIAS}", f"mlp.{_BIAS}")},
    unused={r"(model\.)?mtp_.*": "a layer that predicts further tokens (MTP)"},
)
