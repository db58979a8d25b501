"""Phi-3.5-MoE."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.models.decoder_config import (
    open_fields,
    read_heads,
    read_layers,
    read_model,
    read_moe,
    read_norm,
)
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.rope_config import read_rope
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = dict.fromkeys((*QK_NORM, *QKV_BIAS), (False,))
# Noise of training, and a length that rotary embeddings read only where their two factors differ.
ANY_VALUE = ("input_jitter_noise", "original_max_position_embeddings")


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL, ANY_VALUE)
    norm = read_norm(fields, 1e-5, kind="layer")
    attention = GQA(
        *read_heads(fields),
        rope=_read_rope(fields),
        biases="qkvo" if fields.flag("attention_bias", False) else "",
        window=fields.optional_size("sliding_window"),
    )
    fields.expect("num_experts_per_tok", (2,), "SparseMixer chooses two experts")
    jitter = fields.positive("router_jitter_noise", 0.01)
    moe = read_moe(fields, "intermediate_size", renormalize=False, router="sparsemixer", jitter=jitter)
    count = read_layers(fields)
    fields.expect_all("layer_types", "full_attention", count)
    return read_model(
        fields,
        generation,
        [LayerSpec(attention, RoutedMLP(moe), norm)] * count,
        model_type="phimoe",
        head_bias=fields.flag("lm_head_bias", False),
    )


def _read_rope(fields: Fields) -> RopeConfig:
    """LongRoPE as transformers 5 has it: the divisors for short requests at any length, one factor on sin and cos."""
    max_positions, default_theta = fields.size("max_position_embeddings"), 1e6
    scaling = fields.get("rope_scaling") or fields.get("rope_parameters")
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, Mapping) else "default"
    if kind == "default":
        return read_rope(fields, max_positions, default_theta)
    if kind != "longrope":
        raise fields.error(f"rope scaling {kind!r} is not supported, supported are default and longrope")
    beside = {name: fields.get(name) for name in ("rope_theta", "rope_scaling", "rope_parameters")}
    if beside["rope_scaling"] and beside["rope_parameters"] not in (None, scaling):
        raise fields.error("rope_scaling and rope_parameters differ, and readers disagree on which one holds")
    # The divisors for long requests are never used, nor is the factor that transformers makes of the lengths.
    unused = ("attention_factor", "factor", "long_factor", "original_max_position_embeddings", "rope_type", "type")
    inner = Fields(scaling, f"{fields.source}, rope", any_value=unused)
    theta = inner.positive("rope_theta", default_theta if beside["rope_theta"] is None else beside["rope_theta"])
    divisors, half = inner.get("short_factor"), read_heads(fields)[2] // 2
    if not isinstance(divisors, list) or len(divisors) != half or not all(_is_positive(value) for value in divisors):
        raise inner.error(
            f"short_factor is {divisors!r}, a list of {half} positive numbers was expected", "short_factor"
        )
    factor = inner.positive("short_mscale")
    if inner.positive("long_mscale") != factor:
        raise inner.error(
            f"long_mscale is not short_mscale, {factor:g}: a factor that depends on the longest request of a batch is "
            "not supported",
            "long_mscale",
        )
    inner.refuse_unknown()
    return RopeConfig(theta, "longrope", attention_factor=factor, divisors=tuple(map(float, divisors)))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


FAMILY = Family(
    "phimoe",
    read_config,
    paths={
        "router": ("mlp.router.weight", "block_sparse_moe.gate.weight"),
        "gate": ("w1.weight",),
        "up": ("w3.weight",),
        "down": ("w2.weight",),
    },
    per_expert_path="block_sparse_moe.experts",
    refuses="a factor of LongRoPE that differs for long requests",
)
