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
_GROUPS = {"n_group": 2, "topk_group": 1, "partial_rotary_factor": 0.5, "routed_scaling_factor": 2.5}
_BY_TURNS = ["sliding_attention", "full_attention"] * 2
_LATENT: Mapping[str, Any] = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "head_dim": None,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_HYBRID: Mapping[str, Any] = {
    "num_experts": 4,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "short_mscale": 1.2, "long_mscale": 1.2}

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "norm_topk_prob": True, "mlp_only_layers": [0]},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, "mlp_only_layers": [0]},
    "mixtral": {"num_local_experts": 4, "sliding_window": 16},
    "olmoe": {"num_experts": 4, "clip_qkv": 8.0},
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 16, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "kimi_k2": {**_LATENT, "q_lora_rank": 16, "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
    "glm4_moe_lite": {**_LATENT, "q_lora_rank": 16, "mlp_layer_types": ["dense", *["sparse"] * 3]},
    "mistral4": {**_LATENT, "q_lora_rank": 16, "first_k_dense_replace": 0, "head_dim": 12},
    "qwen3_next": {**_HYBRID, "partial_rotary_factor": 0.5, "norm_topk_prob": True},
    "qwen3_5_moe_text": {**_HYBRID, "partial_rotary_factor": 0.5},
    "qwen3_vl_moe_text": {"num_experts": 4, "mlp_only_layers": [0]},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 16, "layer_types": _BY_TURNS, "attention_bias": True},
    "glm4_moe": {"n_routed_experts": 4, "n_shared_experts": 1, "use_qk_norm": True, "attention_bias": True},
    "minimax_m2": {"num_local_experts": 4, "rotary_dim": 4, "use_qk_norm": True},
    "gemma4_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "num_experts_per_tok": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": None,
        "enable_moe_block": True,
        "sliding_window": 16,
        "layer_types": _WINDOWED,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    },
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
    "sarvam_moe": {"num_experts": 4, "num_shared_experts": 1},
    "bailing_moe": {**_GROUPS, "num_experts": 4, "num_shared_experts": 1, "moe_router_enable_expert_bias": True},
    "afmoe": {"num_experts": 4, "sliding_window": 16, "mup_enabled": True, "layer_types": _WINDOWED},
}
"""`model_type` -> its fields beside those that all families have."""


def example(model_type: str) -> Mapping[str, Any]:
    """A whole config.

    Args:
      model_type: a family with a line in `EXAMPLES`, or `kimi_k25`, whose text part is Kimi K2.
    """
    if model_type == "kimi_k25":
        return {"model_type": model_type, "text_config": example("kimi_k2")}
    return {"model_type": model_type, **_COMMON, **EXAMPLES[model_type]}
