"""MiniMax-M2, M2.1 and M2.5: norms over all heads of q and k, heads that are turned in part, sigmoid router."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import (
    open_fields,
    read_gqa,
    read_heads,
    read_layers,
    read_model,
    read_moe,
    read_norm,
)
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = (
    dict.fromkeys(QK_NORM, (True,))
    | dict.fromkeys((*QKV_BIAS, "attention_bias"), (False,))
    | dict.fromkeys(("layernorm_full_attention_beta", "layernorm_mlp_beta"), (1, 1.0))
    | {
        "norm_topk_prob": (True,),
        "qk_norm_type": ("per_layer",),
        "scoring_func": ("sigmoid",),
        "shared_intermediate_size": (0,),
        "use_routing_bias": (True,),
    }
)
# Of layers that predict further tokens, and of what MiniMax-01 had: linear attention, dense and shared MLPs.
ANY_VALUE = (
    "layernorm_linear_attention_beta",
    "mlp_intermediate_size",
    "mtp_transformer_layers",
    "num_mtp_modules",
    "shared_moe_mode",
    "use_mtp",
)


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL, ANY_VALUE)
    norm = read_norm(fields, 1e-6)
    _, _, head_dim = read_heads(fields)
    turned = fields.optional_size("rotary_dim") or head_dim
    attention = read_gqa(fields, 5e6, rotary_factor=turned / head_dim, norm=norm, qk_norm="projection")
    moe = read_moe(fields, "intermediate_size", renormalize=True, router="sigmoid_bias")
    count = read_layers(fields)
    fields.expect_all("layer_types", "full_attention", count)
    fields.expect_all("attn_type_list", 1, count)
    layer = LayerSpec(attention, RoutedMLP(moe, choice_bias=True), norm)
    return read_model(fields, generation, [layer] * count, model_type="minimax_m2")


FAMILY = Family(
    "minimax_m2",
    read_config,
    # Checkpoints say block_sparse_moe; the modules of transformers 5 are called mlp.
    paths={
        "router": ("mlp.gate.weight", "block_sparse_moe.gate.weight"),
        "choice_bias": ("mlp.e_score_correction_bias", "block_sparse_moe.e_score_correction_bias"),
        "gate": ("w1.weight",),
        "up": ("w3.weight",),
        "down": ("w2.weight",),
    },
    per_expert_path="block_sparse_moe.experts",
    prediction_layers=True,
)
