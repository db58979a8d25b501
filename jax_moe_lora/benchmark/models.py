"""The models that are timed, as the configs of their checkpoints: the library and its peers read the same one."""

from pathlib import Path
from typing import Any

from jax_moe_lora.errors import ConfigError, InputError
from jax_moe_lora.files.safetensors_io import read_json
from jax_moe_lora.models.config_file import parse_model_config
from jax_moe_lora.models.families.registry import wrapped
from jax_moe_lora.models.specs.model import ModelConfig

_QWEN3 = {"model_type": "qwen3_moe", "hidden_act": "silu", "norm_topk_prob": True, "rope_theta": 1e6}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        **_QWEN3,
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 40_960,
    },
    "qwen3-235b-a22b": {
        **_QWEN3,
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 12_288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 40_960,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_theta": 10_000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 163_840,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "attention_bias": True,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "swiglu_limit": 7.0,
        "rope_theta": 150_000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
        "max_position_embeddings": 131_072,
    },
    # Its text part.
    "qwen3.5-35b-a3b": {
        "model_type": "qwen3_5_moe_text",
        "hidden_act": "silu",
        "vocab_size": 248_320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "max_position_embeddings": 262_144,
    },
    "tiny": {
        **_QWEN3,
        "vocab_size": 128,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "moe_intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 32_768,
    },
}


def raw_config(name: str, layers: int | None = None) -> dict[str, Any]:
    """What `config.json` says of a model.

    Args:
      name: a model in `MODELS`, or a folder with a `config.json`, of which the text part is taken.
      layers: another number of layers, which repeat the model's in order; None keeps the model's.

    Returns:
      The fields.

    Raises:
      InputError: no model and no folder has this name.
    """
    if name in MODELS:
        raw = MODELS[name]
    elif (Path(name) / "config.json").is_file():
        raw = dict(wrapped(read_json(Path(name) / "config.json", ConfigError), name))
    else:
        raise InputError(f"model is {name!r}; expected one of {', '.join(MODELS)}, or a folder with a config.json.")
    if layers is None:
        return raw
    kinds = raw.get("layer_types")
    more = {} if kinds is None else {"layer_types": (kinds * layers)[:layers]}
    return raw | {"num_hidden_layers": layers} | more


def model_config(name: str, layers: int | None = None) -> ModelConfig:
    """The config of a named model; see `raw_config`."""
    return parse_model_config(raw_config(name, layers), source=name)
