"""gpt-oss: attention sinks, windows in every second layer, biases everywhere."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax_moe_lora.models.decoder_config import (
    open_fields,
    read_gqa,
    read_layer_types,
    read_model,
    read_moe,
    read_norm,
)
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig
from pallas_kernels.constants import SWIGLU_ALPHA, SWIGLU_LIMIT

# What the class in transformers does whatever its config says, and the only unit that the kernels have.
NEUTRAL: Values = dict.fromkeys((*QK_NORM, *QKV_BIAS), (False,)) | {
    "norm_topk_prob": (True,),  # a softmax over the chosen experts sums to one
    "swiglu_alpha": (SWIGLU_ALPHA,),
    "swiglu_limit": (SWIGLU_LIMIT,),
}
# Read by the original implementation alone, or by nobody: the gated unit is the family's own.
ANY_VALUE = ("experts_per_token", "hidden_act", "initial_context_length")
# The class has it for a config whose `rope_scaling` is missing or null; only another scaling turns it off.
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    if not raw.get("rope_scaling") and not raw.get("rope_parameters"):
        raw = {**raw, "rope_scaling": YARN}
    fields = open_fields(raw, source, NEUTRAL, ANY_VALUE)
    norm = read_norm(fields, 1e-5, wide=True)
    biases = "qkvo" if fields.flag("attention_bias", True) else ""
    full = read_gqa(fields, 150_000.0, biases=biases, sinks=True)
    attention = {
        "full_attention": full,
        "sliding_attention": replace(full, window=fields.size("sliding_window", 128)),
    }
    types = read_layer_types(fields, ("sliding_attention", "full_attention"))
    moe = read_moe(
        fields,
        "intermediate_size",
        renormalize=False,
        router="topk_softmax",
        activation="clamped_swiglu",
        expert_bias=True,
    )
    mlp = RoutedMLP(moe, router_bias=True)
    return read_model(
        fields, generation, [LayerSpec(attention[kind], mlp, norm) for kind in types], model_type="gpt_oss"
    )


FAMILY = Family(
    "gpt_oss",
    read_config,
    paths={"router": ("mlp.router.weight",), "router_bias": ("mlp.router.bias",)},
    interleaved=True,
    stored_in_out=True,
    refuses="another limit or factor of the clamped SwiGLU",
)
