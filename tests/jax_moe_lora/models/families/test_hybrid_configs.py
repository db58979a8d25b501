"""Configs of Qwen3-Next, Qwen3.5-MoE and Qwen3-VL-MoE, as published and as transformers saves them."""

import json
from pathlib import Path
from typing import Any

import pytest

from jax_moe_lora.config import MoEConfig, RopeConfig
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.specs.delta_net import DeltaNet
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig
from jax_moe_lora.models.specs.parameter import Norm
from support.published import expected_shapes, module_shapes

VISION = {
    "depth": 27,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "in_channels": 3,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
}
# Reconstructed from what public repositories say of Qwen/Qwen3-Next-80B-A3B-Instruct, Qwen/Qwen3.5-35B-A3B and
# Qwen/Qwen3-VL-30B-A3B-Instruct.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5120,
        **DELTA_NET,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_next",
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "output_router_logits": False,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.0.dev0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3_5_moe": {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": "qwen3_5_moe",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_output_gate": True,
            "bos_token_id": 248044,
            "dtype": "bfloat16",
            "eos_token_id": 248044,
            "full_attention_interval": 4,
            "head_dim": 256,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "layer_types": [*(["linear_attention"] * 3), "full_attention"] * 10,
            **DELTA_NET,
            "mamba_ssm_dtype": "float32",
            "max_position_embeddings": 262144,
            "mlp_only_layers": [],
            "model_type": "qwen3_5_moe_text",
            "moe_intermediate_size": 512,
            "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": False,
            "num_attention_heads": 16,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 40,
            "num_key_value_heads": 2,
            "output_router_logits": False,
            "pad_token_id": None,
            "partial_rotary_factor": 0.25,
            "rms_norm_eps": 1e-06,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000000,
                "rope_type": "default",
            },
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 512,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": 248320,
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.1",
        "video_token_id": 248057,
        "vision_config": {**VISION, "deepstack_visual_indexes": [], "model_type": "qwen3_5_moe"},
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    },
    "qwen3_vl_moe": {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl_moe",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "decoder_sparse_step": 1,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 6144,
            "max_position_embeddings": 262144,
            "mlp_only_layers": [],
            "model_type": "qwen3_vl_moe_text",
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {**VISION, "deepstack_visual_indexes": [8, 16, 24], "model_type": "qwen3_vl_moe"},
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    },
}
OFFSET = Norm(offset=True)
ROPE = RopeConfig(theta=1e7, rotary_dim=64)
GATED = GQA(16, 2, 256, ROPE, norm=OFFSET, qk_norm="head", gate="q")
SHARED = DenseMLP(512, "silu", "shared", "mlp.shared_expert")


def hybrid(model_type: str, count: int, vocabulary: int, eos: int, moe: MoEConfig, **others: Any) -> ModelConfig:
    mlp = RoutedMLP(moe, shared=SHARED, shared_gate=True)
    delta_net = DeltaNet(16, 32, 128, 128, 4, by_key_head=model_type == "qwen3_next")
    layers = [LayerSpec(GATED if layer % 4 == 3 else delta_net, mlp, OFFSET) for layer in range(count)]
    return ModelConfig(
        *(model_type, vocabulary, 2048, tuple(layers), OFFSET), max_positions=262144, eos_token_ids=(eos,), **others
    )


EXPECTED = {
    "qwen3_next": hybrid("qwen3_next", 48, 151936, 151645, MoEConfig(2048, 512, 512, 10, renormalize=True)),
    "qwen3_5_moe": hybrid(
        *("qwen3_5_moe_text", 40, 248320, 248044, MoEConfig(2048, 512, 256, 8, renormalize=True)), wrapped=True
    ),
    "qwen3_vl_moe": ModelConfig(
        "qwen3_vl_moe_text",
        151936,
        2048,
        (
            LayerSpec(
                GQA(32, 4, 128, RopeConfig(theta=5e6), qk_norm="head"),
                RoutedMLP(MoEConfig(2048, 768, 128, 8, renormalize=True)),
            ),
        )
        * 48,
        max_positions=262144,
        eos_token_ids=(151645,),
        wrapped=True,
    ),
}


def read(folder: Path, model_type: str, text: bool = False, without: tuple[str, ...] = (), **changes: Any) -> Any:
    """Reads a published config with changes, of its text part where it has one and `text` is set."""
    raw = json.loads(json.dumps(PUBLISHED[model_type]))
    inner = raw["text_config"] if text and "text_config" in raw else raw
    inner.update(changes)
    for name in without:
        del inner[name]
    (folder / "config.json").write_text(json.dumps(raw))
    return read_model_config(folder)


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_the_published_config_is_read(tmp_path: Path, model_type: str) -> None:
    assert read(tmp_path, model_type) == EXPECTED[model_type]


@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_the_text_part_is_read_alone(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[model_type]["text_config"]))
    config = read_model_config(tmp_path)
    assert not config.wrapped
    assert config.layers == EXPECTED[model_type].layers


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("model_type", PUBLISHED)
def test_the_config_that_transformers_saves_means_the_same(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoConfig

    fields = {name: value for name, value in PUBLISHED[model_type].items() if name not in ("model_type", "torch_dtype")}
    AutoConfig.for_model(model_type, **fields).save_pretrained(tmp_path)
    assert read_model_config(tmp_path) == EXPECTED[model_type]


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("model_type", PUBLISHED)
def test_names_and_shapes_are_those_of_the_model_at_full_size(model_type: str) -> None:
    config = EXPECTED[model_type]
    assert module_shapes(PUBLISHED[model_type], config) == expected_shapes(config)


def test_a_wrapper_says_whether_the_head_is_tied(tmp_path: Path) -> None:
    assert not read(tmp_path, "qwen3_vl_moe", text=True, tie_word_embeddings=True).tie_embeddings
    assert read(tmp_path, "qwen3_vl_moe", tie_word_embeddings=True).tie_embeddings
    assert not read(tmp_path, "qwen3_vl_moe", without=("tie_word_embeddings",)).tie_embeddings


def test_the_interval_of_full_attention_is_read_where_no_types_are_given(tmp_path: Path) -> None:
    config = read(tmp_path, "qwen3_next", full_attention_interval=2, num_hidden_layers=3)
    assert [type(layer.attention) for layer in config.layers] == [DeltaNet, GQA, DeltaNet]
    types = ["full_attention", "linear_attention", "full_attention"]
    config = read(tmp_path, "qwen3_next", full_attention_interval=2, num_hidden_layers=3, layer_types=types)
    assert [type(layer.attention) for layer in config.layers] == [GQA, DeltaNet, GQA]


def test_dense_layers_of_qwen3_next_have_the_width_of_their_own(tmp_path: Path) -> None:
    config = read(tmp_path, "qwen3_next", num_hidden_layers=2, mlp_only_layers=[1])
    assert [layer.mlp for layer in config.layers][1] == DenseMLP(5120)


def test_weights_are_renormalised_where_the_family_heeds_the_field(tmp_path: Path) -> None:
    assert not read(tmp_path, "qwen3_next", norm_topk_prob=False).moe.renormalize
    assert read(tmp_path, "qwen3_next", without=("norm_topk_prob",)).moe.renormalize


@pytest.mark.parametrize(
    ("model_type", "changes", "named"),
    [
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 48}, ("layer_types", "full_attention")),
        ("qwen3_next", {"layer_types": ["full_attention"]}, ("layer_types", "48")),
        ("qwen3_next", {"linear_num_value_heads": 24}, ("linear_num_value_heads", "24")),
        ("qwen3_next", {"linear_conv_kernel_dim": None}, ("linear_conv_kernel_dim",)),
        ("qwen3_next", {"head_dim": None}, ("head_dim",)),
        ("qwen3_next", {"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        ("qwen3_next", {"attn_output_gate": False}, ("attn_output_gate",)),
        ("qwen3_next", {"partial_rotary_factor": 1.5}, ("partial_rotary_factor", "1.5")),
        ("qwen3_5_moe", {"norm_topk_prob": False}, ("norm_topk_prob",)),
        ("qwen3_5_moe", {"sliding_window": 128}, ("sliding_window",)),
        ("qwen3_5_moe", {"quantization_config": {"quant_method": "hqq"}}, ("quantization_config", "hqq")),
        ("qwen3_vl_moe", {"norm_topk_prob": False}, ("norm_topk_prob",)),
        ("qwen3_vl_moe", {"shared_expert_intermediate_size": 64}, ("shared_expert_intermediate_size",)),
    ],
)
def test_a_field_that_cannot_be_served_is_refused_by_name(
    tmp_path: Path, model_type: str, changes: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, model_type, text=True, **changes)
    assert all(word in str(caught.value) for word in ("config.json", *named)), caught.value


@pytest.mark.parametrize("changes", [{"quantization_config": {"quant_method": "hqq"}}, {"fusion_layers": [3]}])
def test_a_field_of_the_wrapper_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        read(tmp_path, "qwen3_5_moe", **changes)
