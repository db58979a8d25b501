"""Ling 2.0: transformers has no class for it, but Sarvam's with half of each head turned computes the same.

Its checkpoints have the tensors of Sarvam's, so that what `test_sarvam_moe.py` holds of adapters and merging holds
here.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_moe_lora import Model
from jax_moe_lora.config import MoEConfig, RopeConfig
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.config_file import parse_model_config
from jax_moe_lora.models.names import plain_name
from support.layers import assert_close
from support.networks import save_model, tiny
from support.real_configs import expected_shapes, saved_shapes

# Reconstructed; fields and sizes are those of github.com/inclusionAI/Ling-V2, models/configuration_bailing_moe_v2.py.
LING_MINI: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config"},
    "embedding_dropout": 0.0,
    "eos_token_id": 156892,
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "max_position_embeddings": 32768,
    "max_window_layers": 20,
    "model_type": "bailing_moe",
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "moe_shared_expert_intermediate_size": 512,
    "mtp_loss_scaling_factor": 0,
    "n_group": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 20,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "pad_token_id": 156892,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 600000,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "use_bias": False,
    "use_cache": True,
    "use_qk_norm": True,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "vocab_size": 157184,
}
GROUPS = {"n_group": 4, "topk_group": 2, "partial_rotary_factor": 0.5, "rope_theta": 6e5, "num_hidden_layers": 2}


def without(*names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in (LING_MINI | changes).items() if name not in names}


def test_a_published_config_is_read() -> None:
    config = parse_model_config(LING_MINI)
    assert config.routed_layers == tuple(range(1, 20))
    attention = config.layers[0].attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (16, 4, 128)
    assert (attention.rope, attention.qk_norm, attention.biases) == (RopeConfig(6e5, rotary_dim=64), "head", "")
    assert config.moe == MoEConfig(
        *(2048, 512, 256, 8),
        renormalize=True,
        router="sigmoid_bias",
        renormalize_eps=1e-20,
        scaling=2.5,
        num_groups=8,
        top_groups=4,
        group_score="top2_sum",
    )
    absent = ("head_dim", "n_group", "topk_group", "rope_theta", "use_qk_norm", "norm_topk_prob", "use_bias")
    assert parse_model_config(without(*absent)) == config, "the class' own values"
    assert parse_model_config(without("partial_rotary_factor")).layers[0].attention.rope == RopeConfig(6e5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_router_enable_expert_bias": None}, 'the model of Ling 1 is not supported.*router="softmax_topk"'),
        ({"norm_topk_prob": False}, "norm_topk_prob is false"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
        ({"score_function": "softmax"}, "score_function"),
        ({"use_bias": True}, "use_bias"),
        ({"mystery": 1}, "mystery"),
    ],
)
def test_what_the_class_does_otherwise_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_model_config(without(**changes))


@pytest.mark.parity
@pytest.mark.slow(5)
def test_its_tensors_are_those_of_sarvam_at_full_size() -> None:
    ours = parse_model_config(LING_MINI)
    saved = saved_shapes(without("auto_map", "architectures", model_type="sarvam_moe"))
    saved = {plain_name(ours, name): shape for name, shape in saved.items()}
    assert "model.layers.0.attention.query_key_value.weight" in saved
    assert expected_shapes(ours, saved) == saved


@pytest.mark.parity
@pytest.mark.slow(15)
def test_logits_are_those_of_the_class_with_half_of_each_head_turned(tmp_path: Path) -> None:
    import torch

    theirs = tiny("sarvam_moe", **GROUPS)
    folder = save_model(theirs, tmp_path / "model", "1GB")
    raw = json.loads((folder / "config.json").read_text())
    published = {name: raw[name] for name in raw.keys() & LING_MINI.keys() if name not in ("architectures", "use_bias")}
    changes = {"model_type": "bailing_moe", "moe_router_enable_expert_bias": True, "num_experts": 8, **GROUPS}
    renamed = {"num_shared_experts": raw["n_shared_experts"], "use_qkv_bias": raw["attention_bias"]}
    (folder / "config.json").write_text(json.dumps(published | changes | renamed))
    tokens = np.random.default_rng(0).integers(0, 99, (2, 24)).astype(np.int32)
    model = Model.from_pretrained(folder, dtype="float32")
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    assert_close(np.asarray(model.logits(tokens)), expected, 1e-5)
