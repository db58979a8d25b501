"""Configs of the families that ordinary blocks make up: as published, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.specs.fused_mlp import FusedMLP
from jax_moe_lora.models.specs.mlp import DenseMLP
from support.real_configs import check_tensors, read

WINDOWED = ["sliding_attention"] * 3 + ["full_attention"]
PUBLISHED: dict[str, dict[str, Any]] = {
    # from a benchmark's copy of ibm-granite/granite-3.1-1b-a400m-base in a public repository
    "Granite-3.1-1B-A400M": {
        "architectures": ["GraniteMoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.1,
        "attention_multiplier": 0.015625,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "logits_scaling": 6.0,
        "max_position_embeddings": 131072,
        "model_type": "granitemoe",
        "num_attention_heads": 16,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1_500_000.0,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 49152,
    },
    # reconstructed
    "Phi-3.5-MoE": {
        "architectures": ["PhiMoEForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "input_jitter_noise": 0.01,
        "intermediate_size": 6400,
        "lm_head_bias": True,
        "max_position_embeddings": 131072,
        "model_type": "phimoe",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "original_max_position_embeddings": 4096,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "long_factor": [1.0 + 0.9 * index for index in range(64)],
            "long_mscale": 1.243163121016122,
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0 + 0.03 * index for index in range(64)],
            "short_mscale": 1.243163121016122,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.0,
        "router_jitter_noise": 0.01,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 32064,
    },
    # reconstructed
    "FlexOlmo-7x7B": {
        "architectures": ["FlexOlmoForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "flex_olmo",
        "norm_topk_prob": False,
        "num_attention_heads": 32,
        "num_experts": 7,
        "num_experts_per_tok": 5,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 100352,
    },
    # from a public repository's test of dots.llm1 (the fields that it reads), completed
    "dots.llm1": {
        "attention_bias": False,
        "eos_token_id": 151649,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "max_position_embeddings": 32768,
        "max_window_layers": 62,
        "model_type": "dots1",
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 62,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    # reconstructed
    "ERNIE-4.5-21B-A3B": {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "max_position_embeddings": 131072,
        "model_type": "ernie4_5_moe",
        "moe_capacity": [64, 64, 64],
        "moe_gate": "topk",
        "moe_intermediate_size": 1536,
        "moe_k": 6,
        "moe_layer_interval": 1,
        "moe_layer_start_index": 1,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_use_aux_free": True,
        "num_attention_heads": 20,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_bias": False,
        "use_cache": False,
        "vocab_size": 103424,
    },
    # from two public repositories' copies of tencent/Hunyuan-A13B-Instruct, joined
    "Hunyuan-A13B": {
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "attention_bias": False,
        "attention_head_dim": 128,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 3072,
        "max_position_embeddings": 32768,
        "model_type": "hunyuan_v1_moe",
        "moe_intermediate_size": [3072] * 32,
        "moe_topk": [8] * 32,
        "num_attention_heads": 32,
        "num_experts": 64,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_shared_expert": [1] * 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cla": False,
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "vocab_size": 128167,
    },
    # from TensorRT-LLM's test of K-EXAONE, whose layers and window are cut short; 48 layers and 128 are reconstructed
    "K-EXAONE-236B-A23B": {
        "architectures": ["ExaoneMoEForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 53,
        "first_last_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 6144,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "is_moe_layer": [False] + [True] * 47,
        "layer_types": WINDOWED * 12,
        "max_position_embeddings": 262144,
        "model_type": "exaone_moe",
        "moe_intermediate_size": 2048,
        "n_group": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "num_shared_experts": 1,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "sliding_window": 128,
        "sliding_window_pattern": "LLLG",
        "tie_word_embeddings": False,
        "tokenizer_class": "GPT2Tokenizer",
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "transformers_version": "5.0.0.dev0",
        "use_cache": True,
        "vocab_size": 153600,
    },
    # from a public repository's slice of upstage/Solar-Open-100B
    "Solar-Open-100B": {
        "model_type": "solar_open",
        "first_k_dense_replace": 0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 10240,
        "max_position_embeddings": 131072,
        "moe_intermediate_size": 1280,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 65536},
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "vocab_size": 196608,
    },
    # the fields of the published configuration class, with the sizes of sarvamai/sarvam-30b; values are reconstructed
    "Sarvam-30B": {
        "architectures": ["SarvamMoEForCausalLM"],
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "eos_token_id": 1,
        "first_k_dense_replace": 1,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.006,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "max_window_layers": 19,
        "model_type": "sarvam_moe",
        "moe_intermediate_size": 1024,
        "moe_router_enable_expert_bias": True,
        "n_group": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts": 128,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 19,
        "num_key_value_heads": 4,
        "num_shared_experts": 1,
        "output_dropout": 0.0,
        "output_router_logits": False,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 8000000.0,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_bias": False,
        "use_cache": True,
        "use_qk_norm": True,
        "use_qkv_bias": False,
        "vocab_size": 262144,
    },
    # from neuronx-distributed-inference's test, a copy of arcee-ai/Trinity-Nano-Preview
    "Trinity-Nano": {
        "architectures": ["AfmoeForCausalLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_afmoe.AfmoeConfig"},
        "dtype": "bfloat16",
        "global_attn_every_n_layers": 4,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_types": WINDOWED * 14,
        "load_balance_coeff": 0.001,
        "max_position_embeddings": 131072,
        "model_type": "afmoe",
        "moe_intermediate_size": 256,
        "mup_enabled": True,
        "n_group": 1,
        "num_attention_heads": 8,
        "num_dense_layers": 2,
        "num_expert_groups": 1,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 56,
        "num_key_value_heads": 2,
        "num_limited_groups": 1,
        "num_shared_experts": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000,
        "route_norm": True,
        "route_scale": 2.826,
        "score_func": "sigmoid",
        "sliding_window": 2048,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "transformers_version": "4.57.3",
        "use_cache": True,
        "use_grouped_mm": True,
        "vocab_size": 200192,
    },
}
# reconstructed
PUBLISHED["Granite-shared"] = PUBLISHED["Granite-3.1-1B-A400M"] | {
    "model_type": "granitemoeshared",
    "shared_intermediate_size": 1024,
}


@pytest.mark.parity
@pytest.mark.slow(10)
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_a_published_config_are_those_of_transformers(name: str) -> None:
    """Of the first four layers, which have one of each kind; what experts take is the same in all."""
    raw = {
        key: value[:4] if key in ("layer_types", "is_moe_layer", "moe_topk") else value
        for key, value in PUBLISHED[name].items()
    }
    check_tensors(raw | {"num_hidden_layers": 4})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read(name: str) -> None:
    raw = PUBLISHED[name]
    config = read(raw)
    assert config.num_layers == raw["num_hidden_layers"]
    assert (config.vocab_size, config.hidden_size) == (raw["vocab_size"], raw["hidden_size"])


def test_what_fields_say_reaches_the_layers() -> None:
    granite = read(PUBLISHED["Granite-shared"])
    layer = granite.layers[0]
    assert (layer.attention.scale, layer.residual_scale) == (0.015625, 0.22)
    assert (granite.embedding_scale, granite.logit_scale) == (12.0, 1 / 6)
    assert layer.mlp.shared == FusedMLP(1024)
    exaone = read(PUBLISHED["K-EXAONE-236B-A23B"])
    assert [layer.attention.window for layer in exaone.layers[:5]] == [128, 128, 128, None, 128]
    assert [layer.attention.rope is None for layer in exaone.layers[:5]] == [False, False, False, True, False]
    assert isinstance(exaone.layers[0].mlp, DenseMLP)
    assert exaone.routed_layers == tuple(range(1, 48))
    hunyuan = read(PUBLISHED["Hunyuan-A13B"]).layers[0].attention
    assert hunyuan.rope == RopeConfig(theta=1e4 * 1000 ** (128 / 126))
    ernie = read(PUBLISHED["ERNIE-4.5-21B-A3B"])
    assert ernie.tie_embeddings
    assert ernie.routed_layers == tuple(range(1, 28))
    sarvam = read({name: value for name, value in PUBLISHED["Sarvam-30B"].items() if name != "head_dim"})
    assert sarvam == read(PUBLISHED["Sarvam-30B"]), "the class' own width of a head"
    assert (sarvam.layers[0].attention.rope, sarvam.moe.scaling) == (RopeConfig(8e6), 2.5)
    assert read(PUBLISHED["Sarvam-30B"] | {"use_qkv_bias": True}).layers[0].attention.biases == "qkv"
    phi = read(PUBLISHED["Phi-3.5-MoE"]).layers[0].attention
    assert replace(phi.rope, divisors=()) == RopeConfig(1e4, "longrope", attention_factor=1.243163121016122)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "groups of experts": ("dots.llm1", {"n_group": 3}, "n_group is 3, no divisor of the"),
    "a layer type of another family": (
        "Trinity-Nano",
        {"layer_types": ["linear_attention"] * 56},
        "56 of sliding_attention and full_attention were expected",
    ),
    "a window that is missing": ("Trinity-Nano", {"sliding_window": None}, "sliding_window is None"),
    "a negative number of dense layers": ("dots.llm1", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
    "experts per token by layer": ("Hunyuan-A13B", {"moe_topk": [8] * 31 + [4]}, "moe_topk is"),
    "a head width of two": ("Hunyuan-A13B", {"attention_head_dim": 64}, "attention_head_dim is 64: head_dim is 128"),
    "a frequency by length": (
        "Hunyuan-A13B",
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope scaling 'dynamic' is not supported",
    ),
    "three experts of SparseMixer": ("Phi-3.5-MoE", {"num_experts_per_tok": 3}, "SparseMixer chooses two experts"),
    "a factor by the longest request": (
        "Phi-3.5-MoE",
        {"rope_scaling": PUBLISHED["Phi-3.5-MoE"]["rope_scaling"] | {"long_mscale": 1.3}},
        "long_mscale is not short_mscale",
    ),
    "too few divisors": (
        "Phi-3.5-MoE",
        {"rope_scaling": PUBLISHED["Phi-3.5-MoE"]["rope_scaling"] | {"short_factor": [1.0]}},
        "a list of 64 positive numbers was expected",
    ),
    "another list of routed layers": (
        "K-EXAONE-236B-A23B",
        {"is_moe_layer": [True] * 48},
        "but first_k_dense_replace is 1",
    ),
    "half of a head turned": ("Solar-Open-100B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "norms of q and k": ("Solar-Open-100B", {"use_qk_norm": True}, "use_qk_norm = True is not supported"),
    "weights that are not renormalised": ("Trinity-Nano", {"route_norm": False}, "route_norm = False"),
    "a shared width that is no size": (
        "Granite-shared",
        {"shared_intermediate_size": -1},
        "shared_intermediate_size is",
    ),
    "two values of one field": (
        "Sarvam-30B",
        {"attention_bias": True},
        "use_qkv_bias is False, but attention_bias is True",
    ),
    "biases in the MLPs": ("Sarvam-30B", {"use_bias": True}, "use_bias = True is not supported"),
    "no bias for the choice": ("Sarvam-30B", {"moe_router_enable_expert_bias": False}, "enable_expert_bias = False"),
    "a softmax router": ("Sarvam-30B", {"score_function": "softmax"}, "score_function = 'softmax'"),
    "a router of another kind": ("ERNIE-4.5-21B-A3B", {"moe_gate": "top2"}, "moe_gate = 'top2'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_family_lacks_is_refused_by_name(case: str) -> None:
    name, changed, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        read(PUBLISHED[name] | changed)
    assert message in str(caught.value)
