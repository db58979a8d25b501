"""Tiny random checkpoints and adapters, written by the real transformers and peft.

torch, transformers and peft take seconds to import: the functions do that, so that collecting a test costs nothing.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "pad_token_id": None,
}
QWEN: dict[str, Any] = {"intermediate_size": 96, "moe_intermediate_size": 24, "num_experts": 8}
MLA: dict[str, Any] = {
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "shared_expert_intermediate_size": 40,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**QWEN, "head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 40},
    "mixtral": {"intermediate_size": 24, "num_local_experts": 8},
    "olmoe": {"intermediate_size": 24, "num_experts": 8},
    "deepseek_v2": {**MLA, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": {**MLA, "n_group": 4, "topk_group": 2},
    "glm4_moe_lite": {**MLA, "v_head_dim": 24, "mlp_layer_types": ["dense", "sparse"]},
    "mistral4": {**MLA, "first_k_dense_replace": 0},
    "qwen3_next": {**QWEN, **HYBRID, "partial_rotary_factor": 0.5},
    "qwen3_5_moe": {**QWEN, **HYBRID, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}},
    "qwen3_vl_moe": {**QWEN, "head_dim": 16, "rope_parameters": ROPE},
    "gpt_oss": {
        "intermediate_size": 24,
        "num_local_experts": 8,
        "head_dim": 16,
        "sliding_window": 9,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
            "truncate": False,
        },
    },
    "glm4_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "n_group": 4,
        "topk_group": 2,
    },
    "gemma4_text": {
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": None,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 9,
        "final_logit_softcapping": 3.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "minimax_m2": {"intermediate_size": 24, "num_local_experts": 8, "head_dim": 16, "rotary_dim": 8},
}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 64,
    "patch_size": 4,
}
WRAPPERS: dict[str, dict[str, Any]] = {"qwen3_5_moe": {}, "qwen3_vl_moe": {"deepstack_visual_indexes": [0]}}
"""Multimodal models, whose text parts are served -> what their vision towers have beside `VISION`."""
SIGMOID: dict[str, Any] = {
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
SHARED: dict[str, Any] = {**SIGMOID, "n_routed_experts": 8, "n_shared_experts": 2}
GRANITE: dict[str, Any] = {
    "intermediate_size": 24,
    "num_local_experts": 8,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.5,
    "tie_word_embeddings": True,
}
FAMILIES |= {
    "granitemoe": {**GRANITE, "attention_bias": True},
    "granitemoeshared": {**GRANITE, "shared_intermediate_size": 40},
    "phimoe": {
        "intermediate_size": 24,
        "num_local_experts": 8,
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 33,
        "router_jitter_noise": 0.2,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.1, 3.8],
            "long_factor": [2.0] * 8,
            "short_mscale": 1.2,
            "long_mscale": 1.2,
            "original_max_position_embeddings": 64,
        },
    },
    "flex_olmo": {"intermediate_size": 24, "num_experts": 8},
    "dots1": {**SHARED, "sliding_window": 11, "max_window_layers": 1, "norm_topk_prob": True},
    "ernie4_5_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 24,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 2,
        "use_bias": True,
    },
    "hunyuan_v1_moe": {
        "intermediate_size": 24,
        "num_experts": 8,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4},
    },
    "exaone_moe": {
        **SIGMOID,
        "num_experts": 8,
        "num_shared_experts": 1,
        "sliding_window": 11,
        "sliding_window_pattern": 2,
    },
    "solar_open": {
        **SHARED,
        "head_dim": 24,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        },
    },
    "sarvam_moe": {**SHARED, "head_dim": 24, "attention_bias": True, "n_group": 4, "topk_group": 2},
    "afmoe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_shared_experts": 2,
        "num_dense_layers": 1,
        "head_dim": 16,
        "sliding_window": 11,
        "global_attn_every_n_layers": 2,
        "route_scale": 1.5,
        "mup_enabled": True,
    },
}
FIRST = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe")
"""Families that tests of files and formats walk: others have tests of their own (`models/families`)."""
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def tiny(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A random model whose matrices are large enough for logits to differ clearly."""
    import torch
    from transformers import AutoConfig

    torch.manual_seed(seed)
    fields = {**TINY, **FAMILIES[model_type], **overrides}
    if model_type in WRAPPERS:
        fields = {"text_config": fields, "vision_config": VISION | WRAPPERS[model_type]}
    config = AutoConfig.for_model(model_type, **fields)
    model = auto_class(model_type).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.any():
                parameter.mul_(3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
        saved = model.state_dict()
        for name, buffer in model.named_buffers():  # such as biases for the choice of experts
            if name in saved and buffer.is_floating_point():
                buffer.add_(0.1 * torch.randn_like(buffer))
    return model


def causal_lm() -> Any:
    """`AutoModelForCausalLM`, with the class for text that transformers has and does not name there."""
    from transformers import AutoModelForCausalLM, Mistral4Config, Mistral4ForCausalLM

    AutoModelForCausalLM.register(Mistral4Config, Mistral4ForCausalLM, exist_ok=True)
    return AutoModelForCausalLM


def auto_class(model_type: str) -> Any:
    """The class of transformers that makes and loads a model: a wrapper is loaded whole, with its vision tower."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText if model_type in WRAPPERS else causal_lm()


def load_model(base: Path) -> Any:
    import torch

    model_type = json.loads((base / "config.json").read_text())["model_type"]
    return auto_class(model_type).from_pretrained(base, dtype=torch.float32)


def save_model(model: Any, folder: Path, max_shard_size: str = "200KB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_random_adapter(
    base: Path, folder: Path, seed: int = 0, dtype: str = "float32", deviation: float = 0.1, **config: Any
) -> Path:
    """A PEFT adapter on a saved model, with random A and B (PEFT's own B begins at zero)."""
    import torch
    from peft import LoraConfig, get_peft_model

    stored = getattr(torch, dtype)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(load_model(base), LoraConfig(**config))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_((deviation * torch.randn_like(parameter)).to(stored))
        wrapped.to(stored)
        wrapped.save_pretrained(folder)
    return folder


def peft_logits(base: Path, adapter: Path | None, tokens: np.ndarray) -> np.ndarray:
    """Logits of transformers alone, or with one PEFT adapter."""
    import torch

    model = load_peft(base, adapter)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def load_peft(base: Path, adapter: Path | None) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(base)
        return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


def split_to_per_expert(source: Path, target: Path, num_experts: int, mixtral: bool = False) -> Path:
    """The per-expert form that PEFT wrote under transformers 4, by an exact split of a saved 3-D adapter.

    Args:
      mixtral: with that family's names, of the router too.
    """
    block, *parts = ("block_sparse_moe", "w1", "w3", "w2") if mixtral else ("mlp", "gate_proj", "up_proj", "down_proj")
    tensors = load_file(source / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    out: dict[str, np.ndarray] = {}
    for key in list(tensors):
        if not key.endswith("lora_A.weight") or ".mlp.experts" not in key:
            continue
        a = tensors.pop(key)
        b = tensors.pop(key.replace("lora_A", "lora_B"))
        prefix = f"{key[: key.index('.mlp.experts')]}.{block}.experts"
        a = a.reshape(num_experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, num_experts).transpose(2, 0, 1)
        halves = np.split(b, 2, axis=1) if "base_layer" in key else [b]
        names = parts[:2] if "base_layer" in key else parts[2:]
        for name, half in zip(names, halves, strict=True):
            for expert in range(num_experts):
                out[f"{prefix}.{expert}.{name}.lora_A.weight"] = a[expert].copy()
                out[f"{prefix}.{expert}.{name}.lora_B.weight"] = np.ascontiguousarray(half[expert])
    target.mkdir(parents=True, exist_ok=True)
    renamed = {key.replace(".mlp.gate.", f".{block}.gate."): tensor for key, tensor in tensors.items()}
    save_file({**renamed, **out}, target / "adapter_model.safetensors")
    router = ["gate"] if any(".gate." in key for key in renamed) else []
    config["target_modules"] = sorted({*(config["target_modules"] or []), *parts, *router})
    config["target_parameters"] = None
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target
