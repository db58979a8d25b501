"""Configs of Mixtral, OLMoE and Qwen2-MoE: as published, as transformers saves them, and what they are refused for."""

from pathlib import Path
from typing import Any

import pytest

from jax_moe_lora.config import MoEConfig, RopeConfig
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig
from jax_moe_lora.models.specs.parameter import Norm

# mistralai/Mixtral-8x7B-v0.1, allenai/OLMoE-1B-7B-0924 and Qwen/Qwen1.5-MoE-A2.7B as their authors published them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        "vocab_size": 32000,
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "clip_qkv": None,
        "eos_token_id": 50279,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.0.dev0",
        "use_cache": True,
        "vocab_size": 50304,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.39.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}
# Two norms that the families have, and the layers of each.
TIGHT, LOOSE = Norm(1e-6), Norm(1e-5)
SHARED_EXPERT = DenseMLP(5632, modules="shared", path="mlp.shared_expert")
LAYERS = {
    "mixtral": LayerSpec(
        GQA(32, 8, 128, RopeConfig(theta=1e6)), RoutedMLP(MoEConfig(4096, 14336, 8, 2, renormalize=True)), LOOSE
    ),
    "olmoe": LayerSpec(
        GQA(16, 16, 128, RopeConfig(theta=1e4), LOOSE, qk_norm="projection"),
        RoutedMLP(MoEConfig(2048, 1024, 64, 8)),
        LOOSE,
    ),
    "qwen2_moe": LayerSpec(
        GQA(16, 16, 128, RopeConfig(theta=1e6), TIGHT, biases="qkv"),
        RoutedMLP(MoEConfig(2048, 1408, 60, 4), shared=SHARED_EXPERT, shared_gate=True),
        TIGHT,
    ),
}
EXPECTED = {
    "mixtral": ModelConfig(
        *("mixtral", 32000, 4096, (LAYERS["mixtral"],) * 32, LOOSE), max_positions=32768, eos_token_ids=(2,)
    ),
    "olmoe": ModelConfig(
        *("olmoe", 50304, 2048, (LAYERS["olmoe"],) * 16, LOOSE), max_positions=4096, eos_token_ids=(50279,)
    ),
    "qwen2_moe": ModelConfig(
        *("qwen2_moe", 151936, 2048, (LAYERS["qwen2_moe"],) * 24, TIGHT), max_positions=8192, eos_token_ids=(151643,)
    ),
}


def read(model_type: str, without: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    raw = {name: value for name, value in {**PUBLISHED[model_type], **changes}.items() if name not in without}
    return family(model_type).read_config(raw, None, "config.json")


def at(config: ModelConfig, path: str) -> Any:
    """What stands at a path such as `layers.0.norm`."""
    value: Any = config
    for name in path.split("."):
        value = value[int(name)] if name.isdigit() else getattr(value, name)
    return value


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_the_published_config_is_read(model_type: str) -> None:
    assert read(model_type) == EXPECTED[model_type]


@pytest.mark.parity
@pytest.mark.parametrize("model_type", PUBLISHED)
def test_the_config_that_transformers_saves_means_the_same(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoConfig

    fields = {name: value for name, value in PUBLISHED[model_type].items() if name not in ("model_type", "torch_dtype")}
    AutoConfig.for_model(model_type, **fields).save_pretrained(tmp_path)
    saved = read_model_config(tmp_path)
    assert saved == EXPECTED[model_type]


@pytest.mark.parametrize(
    ("model_type", "left_out", "field", "value"),
    [
        ("mixtral", "rope_theta", "layers.0.attention.rope", RopeConfig(theta=1e6)),
        ("mixtral", "rms_norm_eps", "norm", LOOSE),
        ("mixtral", "rms_norm_eps", "layers.0.norm", LOOSE),
        ("mixtral", "sliding_window", "layers.0.attention.window", None),
        ("olmoe", "rope_theta", "layers.0.attention.rope", RopeConfig(theta=1e4)),
        ("olmoe", "rms_norm_eps", "norm", LOOSE),
        ("olmoe", "rms_norm_eps", "layers.0.attention.norm", LOOSE),
        ("olmoe", "clip_qkv", "layers.0.attention.clip", None),
        ("qwen2_moe", "rms_norm_eps", "norm", TIGHT),
    ],
)
def test_what_a_config_leaves_out_takes_the_default_of_the_class(
    model_type: str, left_out: str, field: str, value: Any
) -> None:
    assert at(read(model_type, (left_out,)), field) == value


@pytest.mark.parametrize(
    ("model_type", "changes", "field", "value"),
    [
        ("mixtral", {"sliding_window": 4096}, "layers.0.attention.window", 4096),
        ("mixtral", {"sliding_window": 4096}, "layers.31.attention.window", 4096),
        ("mixtral", {"router_jitter_noise": 0.1}, "layers", (LAYERS["mixtral"],) * 32),  # of training
        ("mixtral", {"head_dim": 64}, "layers.0.attention.head_dim", 64),
        ("olmoe", {"clip_qkv": 8.0}, "layers.0.attention.clip", 8.0),
        ("olmoe", {"attention_bias": True}, "layers.0.attention.biases", "qkvo"),
        ("qwen2_moe", {"qkv_bias": False}, "layers.0.attention.biases", ""),
        ("qwen2_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3}, "routed_layers", (1, 2)),
        ("qwen2_moe", {"mlp_only_layers": [0], "num_hidden_layers": 3}, "layers.0.mlp", DenseMLP(5632)),
        ("qwen2_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 3}, "routed_layers", (1,)),
    ],
)
def test_a_field_is_read(model_type: str, changes: dict[str, Any], field: str, value: Any) -> None:
    assert at(read(model_type, **changes), field) == value


@pytest.mark.parametrize("model_type", ["olmoe", "qwen2_moe"])
def test_expert_weights_are_renormalised_where_the_config_says_so(model_type: str) -> None:
    assert read(model_type, norm_topk_prob=True).moe.renormalize
    assert not read(model_type, without=("norm_topk_prob",)).moe.renormalize


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("mixtral", {"sliding_window": 0}, ("sliding_window", "0")),
        ("mixtral", {"sliding_window": 4096.0}, ("sliding_window", "4096.0")),
        ("mixtral", {"layer_types": ["sliding_attention"] * 32}, ("layer_types", "sliding_attention")),
        ("mixtral", {"norm_topk_prob": False}, ("norm_topk_prob", "False")),
        ("mixtral", {"attention_bias": True}, ("attention_bias",)),
        ("mixtral", {"num_experts": 4}, ("num_experts", "num_local_experts")),
        ("mixtral", {"quantization_config": {"quant_method": "hqq"}}, ("quantization_config", "hqq")),
        ("olmoe", {"clip_qkv": 0.0}, ("clip_qkv", "0.0")),
        ("olmoe", {"clip_qkv": "8"}, ("clip_qkv", "8")),
        ("olmoe", {"sliding_window": 128}, ("sliding_window", "128")),
        ("olmoe", {"moe_intermediate_size": 128}, ("moe_intermediate_size", "128")),
        ("qwen2_moe", {"use_sliding_window": True}, ("use_sliding_window",)),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 24}, ("layer_types",)),
        ("qwen2_moe", {"shared_expert_intermediate_size": None}, ("shared_expert_intermediate_size", "None")),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, ("shared_expert_intermediate_size", "0")),
        ("qwen2_moe", {"qkv_bias": 1}, ("qkv_bias", "1")),
        ("qwen2_moe", {"clip_qkv": 8.0}, ("clip_qkv", "8.0")),
    ],
)
def test_a_field_that_cannot_be_served_is_refused_by_name(
    model_type: str, changes: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(model_type, **changes)
    assert all(word in str(caught.value) for word in ("config.json", *named)), caught.value
