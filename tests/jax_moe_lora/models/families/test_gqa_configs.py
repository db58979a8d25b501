"""Published configs of gpt-oss, GLM-4.5, MiniMax-M2 and Gemma 4 are read, and mean the tensors of transformers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.names import plain_name, table, unused_tensors
from jax_moe_lora.models.specs.gemma4 import Gemma4Layer
from jax_moe_lora.models.specs.mlp import DenseMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig
from support.gqa_configs import PUBLISHED


def read(name: str, without: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    raw = {key: value for key, value in {**PUBLISHED[name], **changes}.items() if key not in without}
    return family(raw["model_type"]).read_config(raw, None, "config.json")


def tensors_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the form of transformers' modules, which stack the experts."""
    of, d, v = family(config.model_type), config.hidden_size, config.vocab_size
    expected: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config.tie_embeddings:
        expected["lm_head.weight"] = (v, d)
    for layer in range(config.num_layers):
        rows = {row.name: row for row in table(config, layer)}
        experts = f"model.layers.{layer}.{of.experts_path}"
        for row in rows.values():
            if not row.experts:
                expected[f"model.layers.{layer}.{row.paths[0]}"] = row.shape
        for stem, module, count in (("gate_up_proj", "gate", 2), ("down_proj", "down", 1)):
            if module in rows:
                e, out, width = rows[module].shape
                shape = (e, width, count * out) if of.stored_in_out else (e, count * out, width)
                expected[f"{experts}.{stem}"] = shape
            if f"{module}_bias" in rows:
                expected[f"{experts}.{stem}_bias"] = (e, count * out)
    return expected


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = PUBLISHED[name]
    fields = {key: value for key, value in raw.items() if key not in ("model_type", "torch_dtype", "architectures")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(raw["model_type"], **fields))
    theirs = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if raw["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert tensors_of(read(name)) == theirs


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_that_transformers_saves_means_the_same(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig

    fields = {key: value for key, value in PUBLISHED[name].items() if key not in ("model_type", "torch_dtype")}
    AutoConfig.for_model(PUBLISHED[name]["model_type"], **fields).save_pretrained(tmp_path)
    generation = {"eos_token_id": PUBLISHED[name]["eos_token_id"] or []}  # some classes have an id of their own
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read_model_config(tmp_path) == read(name)


def test_gpt_oss_has_sinks_everywhere_and_a_window_in_every_second_layer() -> None:
    config = read("gpt-oss-20b")
    assert [layer.attention.window for layer in config.layers] == [128, None] * 12
    assert all(layer.attention.sinks and layer.attention.biases == "qkvo" for layer in config.layers)
    assert (config.moe.router, config.moe.activation, config.moe.expert_bias) == (
        "topk_softmax",
        "clamped_swiglu",
        True,
    )
    assert read("gpt-oss-20b", without=("layer_types", "sliding_window", "attention_bias")) == config


@pytest.mark.parametrize("absent", [{"without": ("rope_scaling",)}, {"rope_scaling": None}, {"rope_parameters": {}}])
def test_gpt_oss_is_scaled_by_yarn_where_its_config_says_nothing(absent: dict[str, Any]) -> None:
    expected = RopeConfig(150_000.0, "yarn", 32.0, 4096, 32.0, 1.0, truncate=False)
    assert read("gpt-oss-20b", **absent).layers[0].attention.rope == expected
    plain = read("gpt-oss-20b", rope_scaling={"rope_type": "default"})
    assert plain.layers[0].attention.rope == RopeConfig(150_000.0)


def test_glm_has_dense_layers_first_and_turns_half_of_a_head() -> None:
    config = read("GLM-4.5")
    assert config.routed_layers == tuple(range(3, 92))
    assert isinstance(config.layers[2].mlp, DenseMLP)
    assert config.layers[0].attention.rope == RopeConfig(1e6, rotary_dim=64)
    assert (config.layers[0].attention.qk_norm, config.layers[0].attention.biases) == ("head", "qkv")
    air = read("GLM-4.5", without=("use_qk_norm", "partial_rotary_factor", "routed_scaling_factor"))
    assert (air.layers[0].attention.qk_norm, air.layers[0].attention.rope.rotary_dim, air.moe.scaling) == (None, 64, 1)


def test_minimax_turns_as_many_dimensions_as_its_config_says() -> None:
    attention = read("MiniMax-M2").layers[0].attention
    assert (attention.rope, attention.qk_norm) == (RopeConfig(5e6, rotary_dim=64), "projection")
    assert read("MiniMax-M2", without=("rotary_dim",)).layers[0].attention.rope == RopeConfig(5e6)
    assert read("MiniMax-M2", partial_rotary_factor=0.25).layers[0].attention.rope.rotary_dim == 32


def test_gemma_has_other_widths_in_its_global_layers_in_either_spelling() -> None:
    config = read("Gemma-4-26B-A4B")
    window, full = config.layers[0], config.layers[5]
    assert isinstance(window, Gemma4Layer)
    assert isinstance(full, Gemma4Layer)
    assert (window.attention.heads.num_kv_heads, window.attention.heads.head_dim) == (8, 256)
    assert (window.attention.heads.window, window.attention.keys_are_values) == (1024, False)
    assert (full.attention.heads.num_kv_heads, full.attention.heads.head_dim) == (2, 512)
    assert (full.attention.heads.window, full.attention.keys_are_values) == (None, True)
    assert full.attention.heads.rope == RopeConfig(1e6, "proportional", rotary_dim=128)
    by_layer = {f"{layer:02}": {"head_dim": 512, "num_key_value_heads": 2} for layer in range(5, 30, 6)}
    spelled = read("Gemma-4-26B-A4B", ("global_head_dim", "num_global_key_value_heads"), per_layer_config=by_layer)
    assert spelled == config
    assert read("Gemma-4-26B-A4B", ("global_head_dim", "layer_types", "rope_parameters")) == config


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "hqq"}}, ("quantization_config", "hqq")),
        ("gpt-oss-20b", {"swiglu_limit": 9.0}, ("swiglu_limit", "9.0", "7.0")),
        ("gpt-oss-20b", {"layer_types": ["chunked_attention"] * 24}, ("layer_types", "chunked_attention")),
        ("gpt-oss-20b", {"attention_sinks": 4}, ("attention_sinks",)),
        ("GLM-4.5", {"first_k_dense_replace": 92}, ("first_k_dense_replace", "92")),
        ("GLM-4.5", {"partial_rotary_factor": 0.01}, ("partial_rotary_factor", "0.01")),
        ("GLM-4.5", {"scoring_func": "softmax"}, ("scoring_func", "sigmoid")),
        ("MiniMax-M2", {"attn_type_list": [0] * 62}, ("attn_type_list",)),
        ("MiniMax-M2", {"shared_intermediate_size": 1024}, ("shared_intermediate_size", "1024")),
        ("MiniMax-M2", {"use_qk_norm": False}, ("use_qk_norm",)),
        ("Gemma-4-26B-A4B", {"enable_moe_block": False}, ("enable_moe_block", "dense")),
        ("Gemma-4-26B-A4B", {"hidden_size_per_layer_input": None}, ("hidden_size_per_layer_input", "256")),
        ("Gemma-4-26B-A4B", {"num_kv_shared_layers": 4}, ("num_kv_shared_layers", "4")),
        ("Gemma-4-26B-A4B", {"use_bidirectional_attention": "all"}, ("use_bidirectional_attention", "all")),
        ("Gemma-4-26B-A4B", {"per_layer_config": {"0": {"head_dim": 64}}}, ("per_layer_config of layer 0",)),
        ("Gemma-4-26B-A4B", {"per_layer_config": {"5": {"head_dim": 64}}}, ("per_layer_config", "differ")),
        ("Gemma-4-26B-A4B", {"rope_parameters": {"rope_theta": 1e4}}, ("rope_parameters",)),
        ("Gemma-4-26B-A4B", {"top_k_experts": 129}, ("top_k_experts", "128")),
    ],
)
def test_a_field_that_cannot_be_served_is_refused_by_name(
    name: str, changes: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        read(name, **changes)
    assert all(word in str(caught.value) for word in ("config.json", *named)), caught.value


def test_a_wrapper_s_text_part_is_read(tmp_path: Path) -> None:
    wrapper = {
        **{"model_type": "gemma4", "text_config": PUBLISHED["Gemma-4-26B-A4B"], "vision_config": {}},
        **{"audio_config": None, "boi_token_id": 255999, "eoi_token_id": 258882, "image_token_id": 258880},
    }
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    assert read_model_config(tmp_path) == replace(read("Gemma-4-26B-A4B"), wrapped=True)


def test_the_kinds_of_layers_are_told_apart() -> None:
    assert len({*read("gpt-oss-20b").layers}) == len({*read("Gemma-4-26B-A4B").layers}) == 2
    assert isinstance(read("gpt-oss-20b").layers[0], LayerSpec)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_gemma_s_tensors_are_found_under_the_names_of_either_class(prefix: str) -> None:
    config = read("Gemma-4-26B-A4B")
    assert plain_name(config, f"{prefix}layers.5.router.scale") == "model.layers.5.router.scale"
    assert plain_name(config, f"{prefix}embed_tokens.weight") == "model.embed_tokens.weight"
    vision = "model.vision_tower.encoder.layers.0.mlp.up_proj.weight"
    assert [*unused_tensors(config, [vision, f"{prefix}norm.weight"])] == [vision]
