"""A small config of each family, with one layer of each kind: what the list of families is made from."""

from collections.abc import Mapping
from typing import Any

_COMMON: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "hidden_act": "silu",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "head_dim": 8,
}
_WINDOWED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "short_mscale": 1.2, "long_mscale": 1.2}

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    "mixtral": {"num_local_experts": 4, "sliding_window": 16},
    "olmoe": {"num_experts": 4, "clip_qkv": 8.0},
    "granitemoe": {
        "num_local_experts": 4,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "logits_scaling": 2.0,
    },
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 16, "residual_multiplier": 0.5},
    "phimoe": {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True, "rope_scaling": _LONGROPE},
    "flex_olmo": {"num_experts": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "norm_topk_prob": True, "first_k_dense_replace": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "num_experts_per_tok": None},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "num_experts_per_tok": None},
    "exaone_moe": {"num_experts": 4, "num_shared_experts": 1, "sliding_window": 16, "layer_types": _WINDOWED},
    "solar_open": {"n_routed_experts": 4, "n_shared_experts": 1, "attention_bias": True},
    "afmoe": {"num_experts": 4, "sliding_window": 16, "mup_enabled": True, "layer_types": _WINDOWED},
}
"""`model_type` -> its fields beside those that all families have."""


def example(model_type: str) -> Mapping[str, Any]:
    """A whole config.

    Args:
      model_type: a family with a line in `EXAMPLES`.
    """
    return {"model_type": model_type, **_COMMON, **EXAMPLES[model_type]}
