"""Hunyuan-A13B."""

from collections.abc import Mapping
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
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = {
    "norm_topk_prob": (True,),
    "use_cla": (False,),
    **dict.fromkeys(QK_NORM, (True,)),
    **dict.fromkeys(QKV_BIAS, (False,)),
}
# Lists with a value for each layer, of what is one value here; and what training did.
ANY_VALUE = (
    "cla_share_factor",
    "eod_token_id",
    "moe_drop_tokens",
    "moe_intermediate_size",
    "moe_layer_num_skipped",
    "moe_random_routing_dropped_token",
    "num_shared_expert",
    "use_mixed_mlp_moe",
)


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields({**raw, **_read_rope(raw, source), **_read_top_k(raw)}, source, NEUTRAL, ANY_VALUE)
    norm, activation = read_norm(fields, 1e-5), read_activation(fields)
    head_dim = fields.size("head_dim")  # the class has no default for it
    fields.expect("attention_head_dim", (None, head_dim), f"head_dim is {head_dim}, of which it is another name")
    attention = read_gqa(
        fields,
        norm=norm,
        qk_norm="head",
        qk_norm_last=True,
        biases="qkvo" if fields.flag("attention_bias", False) else "",
    )
    moe = read_moe(fields, "intermediate_size", renormalize=True, top_k_name="moe_topk")
    shared = DenseMLP(moe.expert_width, activation, "shared", "mlp.shared_mlp")
    routed = RoutedMLP(moe, router_float32=True, shared=shared)
    count = read_layers(fields)
    fields.expect_all("layer_types", "full_attention", count)
    return read_model(fields, generation, [LayerSpec(attention, routed, norm)] * count, model_type="hunyuan_v1_moe")


def _read_top_k(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """K, where it stands as a list with the same number for each layer."""
    top_k = raw.get("moe_topk")
    if isinstance(top_k, list) and len(top_k) > 0 and all(value == top_k[0] for value in top_k):
        return {"moe_topk": top_k[0]}
    return {}


def _read_rope(raw: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """The plain rotary embedding of a larger base that `alpha` of a `dynamic` scaling stands for, at any length."""
    name = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    scaling, head_dim = raw.get(name), raw.get("head_dim")
    if not isinstance(scaling, Mapping) or not isinstance(head_dim, int) or head_dim < 4:
        return {}
    inner = Fields(scaling, f"{source}, rope")
    if "dynamic" not in (scaling.get("rope_type"), scaling.get("type")) or not scaling.get("alpha"):
        return {}
    theta = inner.positive("rope_theta", raw.get("rope_theta") or 10_000.0)
    plain = {"rope_type": "default", "rope_theta": theta * inner.positive("alpha") ** (head_dim / (head_dim - 2))}
    return {"rope_theta": None, "rope_scaling": None, "rope_parameters": plain}


FAMILY = Family(
    "hunyuan_v1_moe",
    read_config,
    paths={
        "router": ("mlp.gate.wg.weight",),
        "q_norm": ("self_attn.query_layernorm.weight",),
        "k_norm": ("self_attn.key_layernorm.weight",),
    },
    refuses="keys and values that layers share (CLA), experts per token by layer",
)
