"""A model of another family is told what it is, and what of it works."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jax_moe_lora import Model
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.families.registry import FAMILIES
from jax_moe_lora.models.families.unsupported import LAYER_SETTINGS

SUPPORTED = f"Supported are {', '.join(FAMILIES)}."
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "experts alone, by moe_lora": (
        {"model_type": "minimax", "num_local_experts": 32},
        ("Mixture-of-Experts family", "experts alone", "moe_lora", "softmax_topk", "renormalize=True"),
    ),
    "experts alone, by its own router": (
        {"model_type": "longcat_flash", "n_routed_experts": 256},
        ("Mixture-of-Experts family", "experts alone", "routed_experts", "own router"),
    ),
    "weights on the experts' input": (
        {"model_type": "llama4_text"},
        ("not supported as a whole: it needs experts whose inputs",),
    ),
    "a text part that is supported": (
        {"model_type": "internvl_chat", "llm_config": {"model_type": "qwen3_moe", "num_experts": 128}},
        ("multimodal", "text part is 'qwen3_moe', which is supported", "save that part"),
    ),
    "a text part that is not, inside another part": (
        {
            "model_type": "qwen3_omni_moe",
            "thinker_config": {"text_config": {"model_type": "jamba", "num_experts": 128}},
        },
        ("multimodal", "'jamba'", "experts alone", "softmax_topk"),
    ),
    "a dense text part": (
        {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 8}},
        ("multimodal", "'llama'", "dense"),
    ),
    "a dense model": ({"model_type": "llama", "hidden_size": 4096}, ("dense model", "num_experts")),
    "an unknown one": ({"model_type": "mystery", "num_experts": 4}, ("mystery", "not a known family")),
    "none": ({}, ("None", "not a known family")),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_type_that_is_not_supported_says_what_it_is_and_what_works(tmp_path: Path, case: str) -> None:
    raw, words = CASES[case]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError) as caught:
        read_model_config(tmp_path)
    message = str(caught.value)
    assert all(word in message for word in (*words, SUPPORTED, str(tmp_path / "config.json"))), message


@pytest.mark.parametrize("model_type", LAYER_SETTINGS)
def test_the_settings_that_are_named_make_a_layer(model_type: str) -> None:
    """What a message tells users to write is a `MoEConfig`."""
    settings = dict(re.findall(r"(\w+)=(\"\w+\"|True)", LAYER_SETTINGS[model_type]))
    config = MoEConfig(8, 4, 2, 1, **{name: json.loads(value.lower()) for name, value in settings.items()})
    assert config.router in ("softmax_topk", "topk_softmax", "sigmoid_bias")


def test_a_dense_model_is_told_apart_by_the_first_call_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(ConfigError, match="dense model"):
        Model.from_pretrained(tmp_path)
