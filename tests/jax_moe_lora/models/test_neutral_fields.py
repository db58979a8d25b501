"""Fields that say what the family does anyway are passed over; a value that would change the result is refused."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.neutral_fields import ANY_VALUE, ONE_VALUE, SAME_AS

QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000000,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}
SMALL: dict[str, Any] = {key: value for key, value in QWEN3.items() if key not in ("model_type", "norm_topk_prob")}
MINIMAL: dict[str, dict[str, Any]] = {
    "qwen3_moe": QWEN3,
    "qwen2_moe": SMALL | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 5632},
    "mixtral": {k: v for k, v in SMALL.items() if k not in ("decoder_sparse_step", "moe_intermediate_size")}
    | {"model_type": "mixtral"},
    "olmoe": {k: v for k, v in SMALL.items() if k not in ("decoder_sparse_step", "moe_intermediate_size")}
    | {"model_type": "olmoe"},
}
# What configs say beside the sizes, by where it was read.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-Coder-30B-A3B-Instruct": (
        "qwen3_moe",
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": 151645,
            "initializer_range": 0.02,
            "intermediate_size": 5472,
            "max_window_layers": 28,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "qkv_bias": False,
            "rope_scaling": None,
            "router_aux_loss_coef": 0.0,
            "shared_expert_intermediate_size": 0,
            "sliding_window": None,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.52.3",
            "use_cache": True,
            "use_qk_norm": True,
            "use_sliding_window": False,
        },
    ),
    "Qwen3-Coder-480B-A35B-Instruct": (
        "qwen3_moe",
        {
            "hidden_size": 6144,
            "intermediate_size": 8192,
            "max_window_layers": 62,
            "moe_intermediate_size": 2560,
            "num_attention_heads": 96,
            "num_experts": 160,
            "num_hidden_layers": 62,
            "num_key_value_heads": 8,
            "qkv_bias": False,
            "router_aux_loss_coef": 0.0,
            "shared_expert_intermediate_size": 0,
            "sliding_window": None,
            "use_qk_norm": True,
            "use_sliding_window": False,
        },
    ),
    "a re-upload by Unsloth": (
        "qwen3_moe",
        {
            "_attn_implementation_autoset": True,
            "_name_or_path": "Qwen/Qwen3-30B-A3B",
            "pad_token_id": 151654,
            "qkv_bias": False,
            "unsloth_fixed": True,
            "unsloth_version": "2026.3.3",
            "use_qk_norm": True,
        },
    ),
    "a config saved by transformers 4 with all of its fields": (
        "mixtral",
        {
            "_comment": "merged by hand",
            "add_cross_attention": False,
            "bad_words_ids": None,
            "chunk_size_feed_forward": 0,
            "cross_attention_hidden_size": None,
            "diversity_penalty": 0.0,
            "do_sample": False,
            "early_stopping": False,
            "encoder_no_repeat_ngram_size": 0,
            "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
            "is_decoder": False,
            "is_encoder_decoder": False,
            "label2id": {"LABEL_0": 0, "LABEL_1": 1},
            "length_penalty": 1.0,
            "max_length": 20,
            "norm_topk_prob": True,
            "num_beams": 1,
            "pruned_heads": {},
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "tie_encoder_decoder": False,
            "top_k": 50,
            "top_p": 1.0,
            "torchscript": False,
            "typical_p": 1.0,
            "use_bfloat16": False,
        },
    ),
    "OLMoE with a class of its own repository": (
        "olmoe",
        {"auto_map": {"AutoConfig": "configuration_olmoe.OlmoeConfig"}, "clip_qkv": None, "qk_layernorm": True},
    ),
    "Qwen2-57B-A14B after Megatron": (
        "qwen2_moe",
        {
            "add_bias_linear": False,
            "ffn_hidden_size": 6144,
            "kv_channels": 128,
            "moe_aux_loss_coeff": 0.001,
            "moe_expert_capacity_factor": None,
            "moe_grouped_gemm": True,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_router_num_groups": None,
            "moe_router_score_function": "softmax",
            "moe_router_topk": 8,
            "moe_router_topk_scaling_factor": None,
            "moe_token_dispatcher_type": "alltoall",
            "normalization": "RMSNorm",
            "num_moe_experts": 128,
            "num_query_groups": 4,
            "position_embedding_type": "rope",
            "pretraining_tp": 1,
            "rotary_base": 10000000,
            "rotary_interleaved": False,
            "rotary_percent": 1.0,
            "swiglu": True,
        },
    ),
}


def read(model_type: str, **more: Any) -> Any:
    return family(model_type).read_config({**MINIMAL[model_type], **more}, None, "config.json")


@pytest.mark.parametrize("where", PUBLISHED)
def test_fields_that_state_what_the_family_is_anyway_are_passed_over(where: str) -> None:
    model_type, fields = PUBLISHED[where]
    sizes = {name: value for name, value in fields.items() if name in MINIMAL[model_type]}
    notes = {name: value for name, value in fields.items() if name not in sizes}
    config = read(model_type, **fields)
    ids = {"eos_token_id": fields["eos_token_id"]} if "eos_token_id" in fields else {}
    assert config == read(model_type, **sizes, **ids)
    assert notes


@pytest.mark.parametrize("empty", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_field_that_is_empty_says_nothing(empty: Any) -> None:
    assert read("qwen3_moe", num_mystery_layers=empty) == read("qwen3_moe")


NON_NEUTRAL = [
    ("qwen3_moe", {"use_qk_norm": False}),
    ("qwen3_moe", {"use_qk_norm": 1}),
    ("qwen3_moe", {"qkv_bias": True}),
    ("qwen3_moe", {"shared_expert_intermediate_size": 512}),
    ("qwen3_moe", {"n_shared_experts": 1}),
    ("qwen3_moe", {"num_nextn_predict_layers": 1}),
    ("qwen3_moe", {"is_encoder_decoder": True}),
    ("qwen3_moe", {"scoring_func": "sigmoid"}),
    ("qwen3_moe", {"routed_scaling_factor": 0.75}),
    ("qwen3_moe", {"n_group": 2}),
    ("qwen3_moe", {"moe_expert_capacity_factor": 1.25}),
    ("qwen3_moe", {"moe_router_topk": 4}),
    ("qwen3_moe", {"num_moe_experts": 64}),
    ("qwen3_moe", {"rotary_percent": 0.5}),
    ("qwen3_moe", {"rotary_percent": 0}),
    ("qwen3_moe", {"residual_scale": 0.0}),
    ("qwen3_moe", {"mystery": 3}),
    ("qwen3_moe", {"mystery": True}),
    ("qwen3_moe", {"quantization": {"group_size": 64, "bits": 4}}),
    ("qwen2_moe", {"use_qk_norm": True}),
    ("mixtral", {"use_qk_norm": True}),
    ("mixtral", {"qkv_bias": True}),
    ("mixtral", {"norm_topk_prob": False}),
    ("mixtral", {"moe_intermediate_size": 128}),
    ("olmoe", {"qk_norm": False}),
    ("olmoe", {"qkv_bias": True}),
]


@pytest.mark.parametrize(("model_type", "field"), NON_NEUTRAL, ids=lambda value: str(value))
def test_a_value_that_would_change_the_result_is_refused_by_name(model_type: str, field: dict[str, Any]) -> None:
    ((name, _),) = field.items()
    with pytest.raises(ConfigError, match=rf"config.json: .*\b{name}\b") as caught:
        read(model_type, **field)
    assert caught.value.key == name


@pytest.mark.parametrize("name", [name for values in ONE_VALUE.values() for name in values])
def test_a_field_with_one_accepted_value_refuses_any_other_with_its_reason(name: str) -> None:
    why, accepted = next((why, values[name]) for why, values in ONE_VALUE.items() if name in values)
    for value in accepted:
        assert read("olmoe", **{name: value}) == read("olmoe")
    with pytest.raises(ConfigError, match=name) as caught:
        read("olmoe", **{name: "another"})
    assert why in str(caught.value)


def test_no_field_stands_in_two_tables_and_every_reason_is_a_sentence() -> None:
    names = [n for group in (*ANY_VALUE.values(), *ONE_VALUE.values(), SAME_AS) for n in group]
    assert len(names) == len(set(names))
    assert all(len(why.split()) >= 4 for why in (*ANY_VALUE, *ONE_VALUE))


@pytest.mark.parametrize("quantised", [None, False, {}, ""])
def test_an_empty_quantisation_is_none(quantised: Any) -> None:
    assert read("qwen3_moe", quantization_config=quantised) == read("qwen3_moe")


def test_a_model_without_dense_layers_needs_no_width_for_them() -> None:
    for width in (0, None):
        assert read("qwen3_moe", intermediate_size=width).layers == read("qwen3_moe").layers
    with pytest.raises(ConfigError, match="intermediate_size"):
        read("qwen3_moe", intermediate_size=0, mlp_only_layers=[3])


@pytest.mark.parity
@pytest.mark.parametrize("model_type", MINIMAL)
def test_transformers_computes_the_same_with_every_accepted_value(tmp_path: Path, model_type: str) -> None:
    """The table's claim, checked on the classes that it speaks of: their state and logits do not change."""
    import torch

    from support.networks import tiny

    # Fields that transformers itself refuses in a config, or that choose what is built or returned.
    skipped = {"dtype", "torch_dtype", "auto_map", "architectures", "model_type", "prefix"}
    neutral = import_module(f"jax_moe_lora.models.families.{model_type}").NEUTRAL
    generation = next(names for why, names in ANY_VALUE.items() if "generation" in why)
    values = {name: accepted[0] for table in ONE_VALUE.values() for name, accepted in table.items() if accepted}
    values |= {name: accepted[0] for name, accepted in neutral.items()}
    values |= {"_comment": "a note", "unsloth_fixed": True, "router_z_loss_coef": 0.5, "hidden_dropout": 0.5}
    values = {name: value for name, value in values.items() if name not in (*skipped, *generation)}
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain, noted = tiny(model_type), tiny(model_type, **values)
        assert json.loads(noted.config.to_json_string())["unsloth_fixed"] is True
        assert plain.state_dict().keys() == noted.state_dict().keys()
        assert torch.equal(plain(ids).logits, noted(ids).logits)
