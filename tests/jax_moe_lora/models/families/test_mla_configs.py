"""Configs of the families with latent attention: as published, as transformers saves them, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from jax_moe_lora.config import MoEConfig, RopeConfig
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.names import parameter_tensors, plain_name, table, tensor_names, unused_tensors
from jax_moe_lora.models.quantised.settings import Quantisation
from jax_moe_lora.models.specs.mla import MLA
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.models.specs.parameter import Norm
from support.mla_configs import PUBLISHED, YARN
from support.networks import causal_lm

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
SIGMOID: dict[str, Any] = {
    "router": "sigmoid_bias",
    "renormalize": True,
    "renormalize_eps": 1e-20,
    "group_score": "top2_sum",
}


def yarn(factor: float, theta: float = 1e4, length: int = 4096, mscale: float = 1.0, fast: float = 32.0) -> RopeConfig:
    return RopeConfig(theta, "yarn", factor, length, fast, 1.0, None, mscale, mscale)


def scale(width: int, mscale: float, factor: float) -> float:
    return width**-0.5 * (0.1 * mscale * math.log(factor) + 1) ** 2


# name -> attention, experts, widths of the dense and of the shared MLP, the first routed layer
EXPECTED: dict[str, tuple[MLA, MoEConfig, int | None, int, int]] = {
    "DeepSeek-V3": (
        MLA(128, 128, 64, 128, 512, 1536, yarn(40.0), scale=scale(192, 1.0, 40.0)),
        MoEConfig(7168, 2048, 256, 8, scaling=2.5, num_groups=8, top_groups=4, **SIGMOID),
        *(18432, 2048, 3),
    ),
    "Kimi-K2": (
        MLA(64, 128, 64, 128, 512, 1536, yarn(32.0, 5e4, fast=1.0), scale=scale(192, 1.0, 32.0)),
        MoEConfig(7168, 2048, 384, 8, scaling=2.827, **SIGMOID),
        *(18432, 2048, 1),
    ),
    "Kimi-K2.5": (
        MLA(64, 128, 64, 128, 512, 1536, yarn(64.0, 5e4), scale=scale(192, 1.0, 64.0)),
        MoEConfig(7168, 2048, 384, 8, scaling=2.827, **SIGMOID),
        *(18432, 2048, 1),
    ),
    "Moonlight": (
        MLA(16, 128, 64, 128, 512, None, RopeConfig(5e4), scale=192**-0.5),
        MoEConfig(2048, 1408, 64, 6, scaling=2.446, **SIGMOID),
        *(11264, 2816, 1),
    ),
    "DeepSeek-V2-Lite": (
        MLA(16, 128, 64, 128, 512, None, yarn(40.0, mscale=0.707), scale=scale(192, 0.707, 40.0)),
        MoEConfig(2048, 1408, 64, 6),
        *(10944, 2816, 1),
    ),
    "GLM-4.7-Flash": (
        MLA(20, 192, 64, 256, 512, 768, RopeConfig(1e6), scale=1 / 16),
        MoEConfig(2048, 1536, 64, 4, scaling=1.8, **SIGMOID),
        *(10240, 1536, 1),
    ),
    "Mistral-Small-4": (
        MLA(
            *(32, 64, 64, 128, 256, 1024, yarn(128.0, length=8192)),
            scale=scale(128, 1.0, 128.0),
            query_growth=(0.1, 8192),
        ),
        MoEConfig(4096, 2048, 128, 4, **(SIGMOID | {"router": "softmax_topk"})),
        *(None, 2048, 0),
    ),
}


def read(name: str, without: tuple[str, ...] = (), **changes: Any) -> ModelConfig:
    raw = {field: value for field, value in {**PUBLISHED[name], **changes}.items() if field not in without}
    return family(raw["model_type"]).read_config(raw, None, "config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_config_is_read(name):
    config = read(name)
    attention, moe, dense, shared, first = EXPECTED[name]
    raw = PUBLISHED[name].get("text_config", PUBLISHED[name])
    assert config.model_type == PUBLISHED[name]["model_type"]
    assert config.num_layers == raw["num_hidden_layers"]
    assert config.routed_layers == tuple(range(first, config.num_layers))
    assert {layer.attention for layer in config.layers} == {attention}
    assert attention.norm == Norm(1e-6)  # whatever rms_norm_eps says
    assert {layer.norm for layer in config.layers} | {config.norm} == {Norm(raw["rms_norm_eps"])}
    assert {layer.mlp for layer in config.layers[:first]} == ({DenseMLP(dense)} if dense else set())
    routed = RoutedMLP(
        moe,
        choice_bias=moe.router == "sigmoid_bias",
        shared=DenseMLP(shared, "silu", "shared", "mlp.shared_experts"),
    )
    assert {layer.mlp for layer in config.layers[first:]} == {routed}
    assert (config.vocab_size, config.max_positions) == (raw["vocab_size"], raw["max_position_embeddings"])
    assert not config.tie_embeddings


@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_that_transformers_saves_means_the_same(tmp_path: Path, name: str) -> None:
    from dataclasses import replace

    saved_as = "deepseek_v3" if name == "Kimi-K2" else PUBLISHED[name]["model_type"]
    _transformers_config(name).save_pretrained(tmp_path)
    assert read_model_config(tmp_path) == replace(read(name), model_type=saved_as)


def _transformers_config(name: str) -> Any:
    from transformers import AutoConfig

    fields = {field: value for field, value in PUBLISHED[name].items() if field not in ("model_type", "torch_dtype")}
    if name == "Kimi-K2.5":  # the names of the vision part are those of the hub's own code
        fields = {field: value for field, value in fields.items() if field != "vision_config"}
    model_type = "deepseek_v3" if name == "Kimi-K2" else PUBLISHED[name]["model_type"]
    return AutoConfig.for_model(model_type, **json.loads(json.dumps(fields)))


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_transformers_model_at_full_size(name):
    """Every tensor of the real size has its place, and there is no other; the experts' are stacked in memory."""
    import torch

    config = read(name)
    hub = _transformers_config(name)
    with torch.device("meta"):
        tensors = causal_lm().from_config(hub.get_text_config()).state_dict()
    shapes = {tensor: tuple(value.shape) for tensor, value in tensors.items()}
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_layers):
        rows = {row.name: row for row in table(config, layer)}
        expected |= {parameter_tensors(config, layer, row): row.shape for row in rows.values() if not row.experts}
        if layer in config.routed_layers:
            count, width, hidden = rows["gate"].shape
            below = f"model.layers.{layer}.mlp.experts"
            expected[f"{below}.gate_up_proj"] = (count, 2 * width, hidden)
            expected[f"{below}.down_proj"] = rows["down"].shape
    outer = (config.vocab_size, config.hidden_size)
    expected |= {"model.embed_tokens.weight": outer, "lm_head.weight": outer, "model.norm.weight": outer[1:]}
    assert shapes == expected


def test_tensors_of_kimi_k25s_files_have_their_places_by_each_ones_names() -> None:
    """The hub's, and both that transformers 5 has; those for images are named as not used."""
    config = read("Kimi-K2.5")
    plain = {"model.layers.1.self_attn.kv_b_proj.weight", "lm_head.weight", "model.embed_tokens.weight"}
    spellings = {
        "language_model.model.layers.1.self_attn.kv_b_proj.weight",
        "language_model.model.blocks.1.self_attn.kv_b_proj.weight",
        "model.language_model.layers.1.self_attn.kv_b_proj.weight",
        "language_model.lm_head.weight",
        "lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
    }
    assert {plain_name(config, name) for name in spellings} == plain
    assert plain <= {name for name in tensor_names(config).values() if isinstance(name, str)}
    images = ["vision_tower.encoder.blocks.0.norm0.bias", "mm_projector.proj.0.weight"]
    images += ["model.vision_tower.patch_embed.proj.bias", "model.mm_projector.pre_norm.weight"]
    assert [*unused_tensors(config, [*spellings, *images])] == images


def test_layers_that_predict_further_tokens_are_named_as_not_used() -> None:
    extra = ["model.layers.61.eh_proj.weight", "model.layers.61.embed_tokens.weight"]
    unused = unused_tensors(read("DeepSeek-V3"), [*extra, "model.layers.60.self_attn.o_proj.weight"])
    assert [*unused] == extra
    assert all("MTP" in what for what in unused.values())


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Kimi-K2.5"])
def test_a_quantisation_is_read_once_all_else_is(name):
    quantisation = read(name, quantization_config=FP8).quantisation
    assert quantisation == Quantisation("fp8", ("fp8_inverse", "fp8_stacked", "fp8"), (128, 128))
    with pytest.raises(ConfigError, match="quantization_config says 'bitsandbytes'"):
        read(name, quantization_config={"quant_method": "bitsandbytes"})
    inner = {"text_config": PUBLISHED[name]["text_config"] | {"mystery": 2}} if name == "Kimi-K2.5" else {"mystery": 2}
    with pytest.raises(ConfigError, match="mystery"):
        read(name, quantization_config=FP8, **inner)


@pytest.mark.parametrize(
    ("name", "changes", "attribute", "value"),
    [
        ("DeepSeek-V3", {"attention_bias": True}, "biases", True),
        ("DeepSeek-V3", {"rope_interleave": False}, "interleaved", False),
        ("DeepSeek-V3", {"num_key_value_heads": None}, "num_heads", 128),
        ("DeepSeek-V3", {"head_dim": 64, "qk_head_dim": 192}, "rope_dim", 64),
        ("DeepSeek-V3", {"rope_scaling": YARN | {"mscale_all_dim": 0}}, "scale", 192**-0.5),
        ("Mistral-Small-4", {"rope_parameters": None}, "query_growth", (0.1, 8192)),
    ],
)
def test_a_field_of_the_attention_is_read(name, changes, attribute, value):
    assert getattr(read(name, **changes).layers[0].attention, attribute) == value


@pytest.mark.parametrize(
    ("name", "changes", "value"),
    [
        ("DeepSeek-V3", {"norm_topk_prob": False}, MoEConfig(*(7168, 2048, 256, 8), scaling=2.5, num_groups=8,
            top_groups=4, router="sigmoid_bias", group_score="top2_sum")),
        ("DeepSeek-V2-Lite", {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
            MoEConfig(2048, 1408, 64, 6, num_groups=8, top_groups=3)),
        ("DeepSeek-V2-Lite", {"n_group": 8, "topk_group": 3}, MoEConfig(2048, 1408, 64, 6)),
    ],
)  # fmt: skip
def test_a_field_of_the_router_is_read(name, changes, value):
    assert read(name, **changes).moe == value


def test_the_layers_of_glm_are_routed_as_the_list_says() -> None:
    types = ["sparse", "dense"] + ["sparse"] * 45
    config = read("GLM-4.7-Flash", without=("first_k_dense_replace",), mlp_layer_types=types)
    assert config.routed_layers == (0, *range(2, 47))


def test_the_head_of_kimi_k25_is_tied_where_the_wrapper_says_so() -> None:
    assert read("Kimi-K2.5", tie_word_embeddings=True).tie_embeddings
    assert read("Kimi-K2.5", without=("tie_word_embeddings",)).tie_embeddings  # the class's default


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("DeepSeek-V3", {"num_key_value_heads": 8}, ("num_key_value_heads", "128 heads")),
        ("DeepSeek-V3", {"head_dim": 128}, ("head_dim", "qk_rope_head_dim")),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, ("scoring_func", "softmax")),
        ("DeepSeek-V3", {"topk_method": "greedy"}, ("topk_method", "greedy")),
        ("DeepSeek-V3", {"moe_layer_freq": 2}, ("moe_layer_freq", "2")),
        ("DeepSeek-V3", {"n_group": 7}, ("n_group", "256 experts")),
        ("DeepSeek-V3", {"topk_group": 9}, ("topk_group", "9", "8 groups")),
        ("DeepSeek-V3", {"n_group": 128, "topk_group": 3}, ("topk_group", "8 experts a token")),
        ("DeepSeek-V3", {"num_experts_per_tok": 257}, ("257",)),
        ("DeepSeek-V3", {"first_k_dense_replace": 61}, ("first_k_dense_replace", "61")),
        ("DeepSeek-V3", {"first_k_dense_replace": True}, ("first_k_dense_replace", "True")),
        ("DeepSeek-V3", {"qk_rope_head_dim": 63}, ("qk_rope_head_dim", "63")),
        ("DeepSeek-V3", {"n_shared_experts": 0}, ("n_shared_experts", "0")),
        ("DeepSeek-V3", {"sliding_window": 4096}, ("sliding_window",)),
        ("DeepSeek-V2-Lite", {"norm_topk_prob": True}, ("norm_topk_prob", "True")),
        ("DeepSeek-V2-Lite", {"topk_method": "noaux_tc"}, ("topk_method", "noaux_tc")),
        ("DeepSeek-V2-Lite", {"mlp_bias": True}, ("mlp_bias",)),
        ("GLM-4.7-Flash", {"first_k_dense_replace": 3}, ("first_k_dense_replace", "3", "mlp_layer_types")),
        ("GLM-4.7-Flash", {"mlp_layer_types": ["dense"]}, ("mlp_layer_types", "47 layers")),
        ("GLM-4.7-Flash", {"mlp_layer_types": ["dense"] * 47}, ("mlp_layer_types", "'sparse'")),
        ("GLM-4.7-Flash", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
        ("Mistral-Small-4", {"head_dim": 96}, ("head_dim", "partial_rotary_factor")),
        ("Mistral-Small-4", {"rope_scaling": YARN}, ("rope_parameters", "rope_scaling")),
        ("Mistral-Small-4", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ("rope_type", "yarn")),
        ("Mistral-Small-4", {"rope_parameters": YARN}, ("llama_4_scaling_beta",)),
        ("Kimi-K2.5", {"text_config": None}, ("text_config", "None")),
        ("Kimi-K2.5", {"text_config": {"model_type": "llama"}}, ("text_config", "llama")),
    ],
)
def test_a_field_that_cannot_be_served_is_refused_by_name(name, changes, named):
    with pytest.raises(ConfigError) as caught:
        read(name, **changes)
    assert all(word in str(caught.value) for word in ("config.json", *named)), caught.value
