"""Multimodal models at full size: the tensors that transformers would save have their places, or are named as unused.

Their text parts are read, and their sizes compared, in `test_gqa_configs.py` and `test_mla_configs.py`.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.config_file import parse_model_config, read_model_config
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.loading import load_params
from support.gqa_configs import PUBLISHED as GQA_PUBLISHED
from support.mla_configs import PUBLISHED as MLA_PUBLISHED
from support.networks import FAMILIES, TINY
from support.real_configs import check_tensors

# Reconstructed but for Kimi-K2.5's; the parts for images are those of the classes' defaults.
WRAPPERS: dict[str, dict[str, Any]] = {
    "Gemma-4-26B-A4B": {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "boi_token_id": 255999,
        "image_token_id": 258880,
        "model_type": "gemma4",
        "text_config": GQA_PUBLISHED["Gemma-4-26B-A4B"],
        "tie_word_embeddings": True,
        "vision_config": {"model_type": "gemma4_vision"},
    },
    "Kimi-K2.5": {name: value for name, value in MLA_PUBLISHED["Kimi-K2.5"].items() if name != "vision_config"},
    "Mistral-Small-4": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": MLA_PUBLISHED["Mistral-Small-4"],
        "tie_word_embeddings": False,
        "vision_config": {"model_type": "pixtral"},
        "vision_feature_layer": -1,
    },
}

PARAMETERS = {"Gemma-4-26B-A4B": 25.2e9, "Kimi-K2.5": 1026e9, "Mistral-Small-4": 118e9}
PIXTRAL = {
    "model_type": "pixtral",
    "head_dim": 8,
    "hidden_size": 16,
    "image_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 8,
}


@pytest.mark.parity
@pytest.mark.slow(10)
@pytest.mark.parametrize("name", WRAPPERS)
def test_every_tensor_has_its_place_or_is_of_the_part_for_images(name: str) -> None:
    text = check_tensors(json.loads(json.dumps(WRAPPERS[name])))
    assert text == pytest.approx(PARAMETERS[name], rel=0.01)


def test_mistral_small_4_is_read_within_its_wrapper() -> None:
    raw = WRAPPERS["Mistral-Small-4"]
    text = parse_model_config(MLA_PUBLISHED["Mistral-Small-4"])
    assert parse_model_config(raw) == replace(text, wrapped=True)
    fp8 = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static", "fmt": "e4m3"}}
    assert parse_model_config(raw | fp8).quantisation is not None
    with pytest.raises(ConfigError, match="model_type is 'mistral', a dense model by its fields"):
        parse_model_config(raw | {"text_config": {"model_type": "mistral", "hidden_size": 8}})
    with pytest.raises(ConfigError, match="mystery"):
        parse_model_config(raw | {"mystery": 1})


@pytest.mark.parity
@pytest.mark.slow(5)
def test_a_checkpoint_of_mistral3_gives_the_arrays_of_its_text_part(tmp_path: Path) -> None:
    """As transformers saves it, and by the names that its modules have in memory."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    text = {**TINY, **FAMILIES["mistral4"], "model_type": "mistral4", "tie_word_embeddings": False}
    fields = {"text_config": text, "vision_config": PIXTRAL, "tie_word_embeddings": False}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("mistral3", **fields))
    model.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    assert config.wrapped
    assert family(config.model_type).model_type == "mistral4"
    loaded = load_params(tmp_path, config, "float32")
    theirs = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    layer = "model.language_model.layers.1."
    np.testing.assert_array_equal(loaded.layers[1]["kv_b"], theirs[f"{layer}self_attn.kv_b_proj.weight"])
    np.testing.assert_array_equal(loaded.layers[1]["down"], theirs[f"{layer}mlp.experts.down_proj"])
    np.testing.assert_array_equal(loaded.head, theirs["lm_head.weight"])
    assert not any(name.startswith("model.language_model") for name in load_file(tmp_path / "model.safetensors"))
    save_file({name: np.ascontiguousarray(array) for name, array in theirs.items()}, tmp_path / "model.safetensors")
    again = load_params(tmp_path, config, "float32")
    jax.tree.map(np.testing.assert_array_equal, again, loaded)
