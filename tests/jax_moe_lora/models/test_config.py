"""`config.json` is read in both spellings in use, and whatever would change the result unseen is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.families.qwen3_moe import read_config
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.specs.mlp import DenseMLP
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.models.specs.parameter import Norm

# Qwen/Qwen3-30B-A3B as its authors published it.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def read(generation: dict[str, Any] | None = None, without: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    raw = {name: value for name, value in {**PUBLISHED, **changes}.items() if name not in without}
    return read_config(raw, generation, "config.json")


def test_the_published_config_is_read() -> None:
    config = read(generation={"eos_token_id": [151645, 151643]})
    assert (config.vocab_size, config.num_layers, config.hidden_size) == (151936, 48, 2048)
    assert config.layers == (config.layers[0],) * 48
    attention = config.layers[0].attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (32, 4, 128)
    assert (config.moe.num_experts, config.moe.top_k, config.moe.expert_width) == (128, 8, 768)
    assert (config.moe.router, config.moe.renormalize, config.moe.activation) == ("softmax_topk", True, "silu")
    assert config.max_positions == 40960
    assert {config.norm, config.layers[0].norm, attention.norm} == {Norm(1e-6)}
    assert attention.rope == RopeConfig(theta=1e6)
    assert config.routed_layers == tuple(range(48))
    assert (attention.qk_norm, attention.biases, config.tie_embeddings) == ("head", "", False)
    assert (attention.window, attention.clip, config.layers[0].mlp.shared) == (None, None, None)
    assert read(mlp_only_layers=[3]).layers[3].mlp == DenseMLP(6144)
    assert config.eos_token_ids == (151645, 151643)


def test_the_spelling_of_transformers_5_means_the_same() -> None:
    spelled = read(
        without=("num_experts", "rope_theta", "rope_scaling", "torch_dtype"),
        num_local_experts=128,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        dtype="bfloat16",
        layer_types=["full_attention"] * 48,
    )
    assert spelled == read()


@pytest.mark.parity
@pytest.mark.parametrize(
    "rope", [{"rope_type": "default"}, {"rope_type": "yarn", **YARN}, {"rope_type": "llama3", **LLAMA3}]
)
def test_a_config_that_transformers_saves_means_the_same(tmp_path: Path, rope: dict[str, Any]) -> None:
    from transformers import Qwen3MoeConfig

    dropped = ("rope_theta", "rope_scaling", "torch_dtype", "transformers_version", "model_type")
    raw = {name: value for name, value in PUBLISHED.items() if name not in dropped}
    Qwen3MoeConfig(**raw, rope_parameters={**rope, "rope_theta": 1e6}).save_pretrained(tmp_path)
    scaling = None if rope["rope_type"] == "default" else rope
    assert read_model_config(tmp_path) == read(rope_scaling=scaling)


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        ("linear", {"factor": 2.0}, RopeConfig(1e6, "linear", 2.0, 40960)),
        ("yarn", YARN, RopeConfig(1e6, "yarn", 4.0, 32768)),
        (
            "yarn",
            {**YARN, "beta_fast": 16, "attention_factor": 1.1},
            RopeConfig(1e6, "yarn", 4.0, 32768, 16.0, 1.0, 1.1),
        ),
        ("llama3", LLAMA3, RopeConfig(1e6, "llama3", 8.0, 8192)),
    ],
)
def test_rope_scalings_are_read(spelling: str, kind: str, given: dict[str, Any], expected: RopeConfig) -> None:
    assert read(rope_scaling={spelling: kind, **given}).layers[0].attention.rope == expected


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        (7, None, (7,)),
        ([7, 9], None, (7, 9)),
        (None, None, ()),
        (7, {"eos_token_id": [1, 2]}, (1, 2)),
        (7, {"eos_token_id": None}, (7,)),
        (7, {"temperature": 0.6}, (7,)),
    ],
)
def test_generation_config_overrides_end_tokens(own: Any, generation: dict | None, expected: tuple[int, ...]) -> None:
    assert read(generation, eos_token_id=own).eos_token_ids == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (0, 1, 2, 3)),
        ({"mlp_only_layers": None}, (0, 1, 2, 3)),
        ({"mlp_only_layers": [0, 3]}, (1, 2)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3,)),
    ],
)
def test_routed_layers_follow_the_step_and_the_list(changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert read(num_hidden_layers=4, **changes).routed_layers == expected


def test_what_a_config_leaves_out_takes_the_default_of_the_class() -> None:
    config = read(without=("head_dim", "norm_topk_prob", "tie_word_embeddings", "attention_bias", "rope_theta"))
    attention = config.layers[0].attention
    assert (attention.head_dim, config.moe.renormalize, config.tie_embeddings) == (64, False, False)
    assert (attention.biases, attention.rope) == ("", RopeConfig(theta=10_000.0))


@pytest.mark.parametrize(
    "harmless", [{"attention_dropout": 0.1}, {"router_aux_loss_coef": 0.5}, {"new": None}, {"new": False}]
)
def test_fields_without_effect_are_passed_over(harmless: dict[str, Any]) -> None:
    assert read(**harmless) == read()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"new_gate": 3}, ("new_gate", "3")),
        ({"new_multiplier": 0}, ("new_multiplier", "0")),
        ({"hidden_act": ["silu"]}, ("hidden_act",)),
        ({"rope_theta": -1.0}, ("rope_theta", "-1.0")),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, ("rope_theta", "5.0")),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            ("rope_scaling", "rope_parameters"),
        ),
        ({"shared_expert_intermediate_size": 512}, ("shared_expert_intermediate_size",)),
        ({"use_sliding_window": True}, ("use_sliding_window",)),
        ({"layer_types": ["full_attention"] * 47 + ["sliding_attention"]}, ("layer_types", "sliding_attention")),
        ({"hidden_act": "gelu"}, ("hidden_act", "gelu")),
        ({"num_key_value_heads": 5}, ("num_attention_heads", "num_key_value_heads")),
        ({"num_key_value_heads": None}, ("num_key_value_heads",)),
        ({"num_experts_per_tok": 129}, ("num_experts_per_tok", "129")),
        ({"num_local_experts": 64}, ("num_experts", "num_local_experts")),
        ({"num_experts": 0}, ("num_experts",)),
        ({"num_experts": 10**9}, ("num_experts",)),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers",)),
        ({"hidden_size": -1}, ("hidden_size", "-1")),
        ({"hidden_size": 2048.0}, ("hidden_size",)),
        ({"vocab_size": True}, ("vocab_size",)),
        ({"head_dim": 127}, ("head_dim", "127")),
        ({"head_dim": None, "hidden_size": 2050}, ("head_dim", "2050")),
        ({"rms_norm_eps": 0.0}, ("rms_norm_eps",)),
        ({"norm_topk_prob": "true"}, ("norm_topk_prob",)),
        ({"mlp_only_layers": [48]}, ("mlp_only_layers", "48")),
        ({"decoder_sparse_step": 0}, ("decoder_sparse_step",)),
        ({"eos_token_id": "</s>"}, ("eos_token_id",)),
    ],
)
def test_a_field_that_cannot_be_served_is_refused_by_name(changes: dict[str, Any], named: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert all(word in str(caught.value) for word in ("config.json", *named))


@pytest.mark.parametrize(
    "field", ["hidden_size", "num_experts", "num_hidden_layers", "vocab_size", "moe_intermediate_size"]
)
def test_a_missing_size_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        read(without=(field,))


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"type": "longrope"}, "longrope"),
        ({"type": "linear", "rope_type": "yarn", **YARN}, "linear"),
        ({"type": "yarn", **YARN, "beta_fast": 0.0}, "beta_fast"),
        ({"type": "llama3", **LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "linear", "factor": 0.5}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "low_freq_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("yarn", "rope_scaling"),
    ],
)
def test_a_rope_scaling_that_is_not_supported_is_refused_by_name(scaling: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        read(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("quantisation", "named"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"quant_method": "gguf"}, "gguf"),
        ({"mode": "affine", "bits": 4}, "affine"),
    ],
)
def test_a_quantisation_that_is_not_supported_is_refused_by_its_method(
    quantisation: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=f"{named}.*bfloat16"):
        read(quantization_config=quantisation)


def test_an_unknown_model_type_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, "model_type": "mystery"}))
    with pytest.raises(ConfigError, match=r"mystery.*qwen3_moe"):
        read_model_config(tmp_path)
    with pytest.raises(ConfigError, match="None"):
        family(None)


@pytest.mark.parametrize(("text", "named"), [(None, "give the folder of a model"), ("{", "JSON"), ("[]", "object")])
def test_a_config_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, text: str | None, named: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=f"config.json.*{named}"):
        read_model_config(tmp_path)
