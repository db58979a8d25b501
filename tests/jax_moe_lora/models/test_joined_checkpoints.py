"""Checkpoints with one tensor for q, k and v, and other names (Sarvam), are those with a tensor each, bit for bit."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora import LoRAAdapter, merge_adapter
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.lora import same_matrices, uniform
from jax_moe_lora.errors import AdapterFormatError, CheckpointError
from jax_moe_lora.models import loading
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import adapter_sites
from support.checkpoints import TINY, load, write

Tensors = dict[str, np.ndarray]
PUBLISHED_NAMES = {
    "model.embed_tokens": "model.word_embeddings",
    "self_attn.o_proj": "attention.dense",
    "self_attn.q_norm": "attention.query_layernorm",
    "self_attn.k_norm": "attention.key_layernorm",
    "gate.e_score_correction_bias": "gate.expert_bias",
}


def save(folder: Path, tensors: Tensors, **fields: Any) -> Path:
    folder.mkdir()
    raw = {name: value for name, value in TINY.items() if name != "mlp_only_layers"}
    raw |= {"model_type": "sarvam_moe", "n_shared_experts": 1, "attention_bias": True, **fields}
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


def own(folder: Path) -> Tensors:
    """A tensor for each parameter, by the names of transformers' modules; the first layer is dense."""
    tensors = write(folder, mlp_only_layers=[0])
    random, at, moe = np.random.default_rng(1), "model.layers.1.mlp", TINY["moe_intermediate_size"]
    shapes = {f"{at}.shared_experts.{part}_proj.weight": (moe, TINY["hidden_size"]) for part in ("gate", "up")}
    shapes |= {f"{at}.shared_experts.down_proj.weight": (TINY["hidden_size"], moe)}
    shapes |= {f"{at}.gate.e_score_correction_bias": (TINY["num_experts"],)}
    for layer in range(TINY["num_hidden_layers"]):
        for module in "qkv":
            name = f"model.layers.{layer}.self_attn.{module}_proj"
            shapes[f"{name}.bias"] = tensors[f"{name}.weight"].shape[:1]
    return tensors | {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def published(tensors: Tensors) -> Tensors:
    """The same in the form of the hub."""
    joined: Tensors = {}
    for name, value in tensors.items():
        if "q_proj" in name:
            parts = [tensors[name.replace("q_proj", f"{module}_proj")] for module in "qkv"]
            joined[name.replace("self_attn.q_proj", "attention.query_key_value")] = np.concatenate(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            for ours, theirs in PUBLISHED_NAMES.items():
                name = name.replace(ours, theirs)
            joined[name] = value
    return joined


def assert_equal_trees(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("piece_bytes", [100, loading.PIECE_BYTES])
def test_the_published_form_is_the_same_model(
    tmp_path: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = own(tmp_path / "written")
    monkeypatch.setattr(loading, "PIECE_BYTES", piece_bytes)
    found = load(save(tmp_path / "published", published(tensors)))
    assert_equal_trees(found, load(save(tmp_path / "own", tensors)))
    np.testing.assert_array_equal(np.asarray(found.layers[1]["v"]), tensors["model.layers.1.self_attn.v_proj.weight"])


def test_merging_keeps_the_published_form_and_changes_each_ones_rows(tmp_path: Path) -> None:
    tensors = own(tmp_path / "written")
    folders = [save(tmp_path / "own", tensors), save(tmp_path / "published", published(tensors))]
    sites, random = adapter_sites(read_model_config(folders[0])), np.random.default_rng(2)
    weights = {
        (sites[module].layers[-1], module): uniform(
            random.standard_normal((1, 2, sites[module].in_width), np.float32),
            random.standard_normal((1, sites[module].out_width, 2), np.float32),
            0.5,
            1,
        )
        for module in ("q", "v", "o", "embedding", "head")
    }
    for folder in folders:
        merge_adapter(LoRAAdapter("mine", weights), folder, tmp_path / f"merged-{folder.name}")
    merged = load_file(tmp_path / "merged-published" / "model.safetensors")
    assert merged.keys() == published(tensors).keys()
    assert_equal_trees(load(tmp_path / "merged-published"), load(tmp_path / "merged-own"))
    changed, base = load(tmp_path / "merged-published"), load(folders[0])
    for module in "qkvo":
        same = (np.asarray(changed.layers[1][module]) == np.asarray(base.layers[1][module])).all()
        assert same == (module == "k"), module
    assert (np.asarray(changed.embedding) != np.asarray(base.embedding)).any()


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    return str(caught.value)


def test_a_joined_tensor_of_another_height_is_named_with_the_expected_shape(tmp_path: Path) -> None:
    tensors = published(own(tmp_path / "written"))
    tensors["model.layers.0.attention.query_key_value.weight"] = np.zeros((40, 16), np.float32)
    message = refusal(save(tmp_path / "cut", tensors))
    assert "layers.0.attention.query_key_value.weight" in message
    assert "has shape [40, 16]; the config expects [48, 16]." in message


def test_both_forms_at_once_are_refused(tmp_path: Path) -> None:
    tensors = own(tmp_path / "written")
    projections = {name: value for name, value in tensors.items() if "q_proj" in name}
    message = refusal(save(tmp_path / "both", published(tensors) | projections))
    assert "no place for" in message
    assert "self_attn.q_proj" in message


def test_a_joined_tensor_that_is_quantised_is_refused_by_name(tmp_path: Path) -> None:
    tensors = published(own(tmp_path / "written"))
    scale = {"model.layers.0.attention.query_key_value.weight_scale_inv": np.ones((1, 1), np.float32)}
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    message = refusal(save(tmp_path / "few-bits", tensors | scale, quantization_config=settings))
    assert "no place for" in message
    assert "attention.query_key_value.weight_scale_inv" in message


def adapter_folder(folder: Path, tensors: Tensors, targets: list[str]) -> Path:
    folder.mkdir()
    at = "base_model.model.model.layers.1."
    save_file({f"{at}{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_on_the_joined_projection_is_one_on_each_with_one_a(tmp_path):
    config = read_model_config(save(tmp_path / "model", {}))
    sites, names = adapter_sites(config), adapter_names(config)
    random, heights = np.random.default_rng(0), [sites[module].out_width for module in "qkv"]
    a = random.standard_normal((3, config.hidden_size)).astype(np.float32)
    b = random.standard_normal((sum(heights), 3)).astype(np.float32)
    joined = {"attention.query_key_value.lora_A.weight": a, "attention.query_key_value.lora_B.weight": b}
    apart: Tensors = {}
    for module, part in zip("qkv", np.split(b, np.cumsum(heights)[:-1]), strict=True):
        at = f"self_attn.{module}_proj.lora"
        apart |= {f"{at}_A.weight": a, f"{at}_B.weight": np.ascontiguousarray(part)}
    one = read_adapter(adapter_folder(tmp_path / "one", joined, ["query_key_value"]), sites, names)
    three = read_adapter(adapter_folder(tmp_path / "three", apart, ["q_proj", "k_proj", "v_proj"]), sites, names)
    assert one.weights.keys() == three.weights.keys() == {(1, module) for module in "qkv"}
    for key, weights in one.weights.items():
        np.testing.assert_array_equal(weights.delta(0), three.weights[key].delta(0))
    assert same_matrices(one.weights[1, "q"].a, one.weights[1, "v"].a)
    both = adapter_folder(tmp_path / "both", joined | apart, ["query_key_value", "q_proj", "k_proj", "v_proj"])
    with pytest.raises(AdapterFormatError, match="which another key holds too"):
        read_adapter(both, sites, names)
    narrow = joined | {"attention.query_key_value.lora_B.weight": np.ascontiguousarray(b[1:])}
    with pytest.raises(AdapterFormatError, match=rf"the model expects \[{sum(heights)}, 3\]"):
        read_adapter(adapter_folder(tmp_path / "narrow", narrow, ["query_key_value"]), sites, names)
    missing = adapter_folder(tmp_path / "missing", apart, ["query_key_value", "q_proj", "k_proj", "v_proj"])
    with pytest.raises(AdapterFormatError, match="targets 'query_key_value', and"):
        read_adapter(missing, sites, names)
