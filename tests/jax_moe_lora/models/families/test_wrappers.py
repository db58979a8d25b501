"""Multimodal models whose text part is served: forms of their checkpoints, and names in adapters."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights
from jax_moe_lora.adapters.writing import write_adapter
from jax_moe_lora.errors import AdapterFormatError, CheckpointError
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import load_params, open_checkpoint
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import adapter_sites
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.tools.merge import merge_adapter
from support.layers import assert_close
from support.models import ADAPTER_NAMES
from support.networks import save_model, tiny

TEXT = {
    "model_type": "qwen3_5_moe_text",
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "hidden_act": "silu",
    "max_position_embeddings": 64,
}
INNER, OUTER = "base_model.model.model.language_model.layers.", "base_model.model.lm_head."


def config_of(folder: Path, wrapped: bool = True) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    raw = {"model_type": "qwen3_5_moe", "text_config": TEXT, "vision_config": {}} if wrapped else TEXT
    (folder / "config.json").write_text(json.dumps(raw))
    return read_model_config(folder)


def random_adapter(config: ModelConfig) -> LoRAAdapter:
    """Rank 2 on everything; gate and up have one A, as PEFT trains them; layer 1 has another scale."""
    random, weights = np.random.default_rng(0), {}
    for module, site in adapter_sites(config).items():
        for layer in site.layers:
            shapes = (site.num_experts, 2, site.in_width), (site.num_experts, site.out_width, 2)
            a, b = (random.standard_normal(shape).astype(np.float32) for shape in shapes)
            a = weights[layer, "gate"].a if module == "up" else a
            scale = np.full(site.num_experts, 1.5 if layer == 1 else 1.0, np.float32)
            weights[layer, module] = LoRAWeights(a, b, np.full(site.num_experts, 2, np.int32), scale)
    return LoRAAdapter("random", weights)


def assert_same(found: LoRAAdapter, expected: LoRAAdapter) -> None:
    assert found.weights.keys() == expected.weights.keys()
    for key, weights in expected.weights.items():
        for side in ("a", "b", "scale"):
            assert (getattr(found.weights[key], side) == getattr(weights, side)).all(), (key, side)


@pytest.mark.parametrize("layout", ["peft", "peft-per-expert", "tinker"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_adapters_are_written_in_the_names_of_their_base_and_read_by_both(tmp_path, layout, wrapped):
    configs = {kind: config_of(tmp_path / str(kind), kind) for kind in (True, False)}
    config = configs[wrapped]
    adapter = random_adapter(config)
    if layout != "peft":
        kept = {key: value for key, value in adapter.weights.items() if key[1] not in ("embedding", "up")}
        adapter = LoRAAdapter("random", kept)
    if layout == "tinker":  # which has one scale for all
        even = {key: replace(value, scale=np.ones_like(value.scale)) for key, value in adapter.weights.items()}
        adapter = LoRAAdapter("random", even)
    write_adapter(adapter, tmp_path / "adapter", adapter_sites(config), adapter_names(config), layout)
    keys = [*load_file(tmp_path / "adapter" / "adapter_model.safetensors")]
    inside = [key for key in keys if ".layers." in key]
    assert all(key.startswith(INNER) == wrapped for key in inside)
    assert layout == "tinker" or any(key.startswith(OUTER) for key in keys)
    for other in configs.values():
        assert_same(read_adapter(tmp_path / "adapter", adapter_sites(other), adapter_names(other)), adapter)


def rewritten(folder: Path, tmp_path: Path, rename) -> Path:
    """The adapter with other keys."""
    tensors = {rename(key): value for key, value in load_file(folder / "adapter_model.safetensors").items()}
    (tmp_path / "renamed").mkdir()
    save_file(tensors, tmp_path / "renamed" / "adapter_model.safetensors")
    (tmp_path / "renamed" / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return tmp_path / "renamed"


RENAMES = {
    "mixed": (lambda key: key.replace("model.language_model.layers.0.", "model.layers.0."), "begins with"),
    "another wrapper's": (lambda key: key.replace("model.language_model.", "language_model.model."), "begin with"),
    "the vision tower's": (
        lambda key: key.replace("language_model.layers.0.linear_attn.out_proj", "visual.blocks.0.attn.proj"),
        "vision tower",
    ),
}


@pytest.mark.parametrize("case", RENAMES)
def test_keys_of_another_part_or_wrapper_are_refused_by_name(tmp_path, case):
    config, (rename, words) = config_of(tmp_path / "model"), RENAMES[case]
    sites, names = adapter_sites(config), adapter_names(config)
    write_adapter(random_adapter(config), tmp_path / "adapter", sites, names)
    with pytest.raises(AdapterFormatError, match=words):
        read_adapter(rewritten(tmp_path / "adapter", tmp_path, rename), sites, names)


def test_a_model_without_a_wrapper_refuses_the_names_of_one(tmp_path):
    config = config_of(tmp_path / "model")
    sites, names = adapter_sites(config), adapter_names(config)
    write_adapter(random_adapter(config), tmp_path / "adapter", sites, names)
    plain = replace(names, prefixes=ADAPTER_NAMES.prefixes)
    with pytest.raises(AdapterFormatError, match="language_model"):
        read_adapter(tmp_path / "adapter", sites, plain)


def test_patterns_of_ranks_and_scales_name_modules_of_the_wrapper(tmp_path):
    config = config_of(tmp_path / "model")
    sites, names = adapter_sites(config), adapter_names(config)
    write_adapter(random_adapter(config), tmp_path / "adapter", sites, names)
    file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text())
    fields["alpha_pattern"] = {r"model\.language_model\.layers\.0\..*": 10} | fields["alpha_pattern"]
    file.write_text(json.dumps(fields))
    assert (read_adapter(tmp_path / "adapter", sites, names).weights[0, "delta_out"].scale == 5).all()


@cache
def saved(model_type: str, folder: Path) -> Path:
    return save_model(tiny(model_type, num_hidden_layers=2), folder / model_type, "1GB")


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_5_moe", "qwen3_vl_moe"])
def test_every_form_of_a_checkpoint_gives_the_same_arrays(tmp_path, model_type):
    """Per expert or fused, `[E, out, in]` or `[E, in, out]`, below `language_model.` or not, vision and MTP beside."""
    base = saved(model_type, tmp_path)
    config = read_model_config(base)
    expected = load_params(base, config, "float32")
    forms = {"fused": fused(load_file(base / "model.safetensors"), config.moe.num_experts)}
    forms["transposed"] = {
        name: value.swapaxes(1, 2).copy() if value.ndim == 3 and "experts" in name else value
        for name, value in forms["fused"].items()
    }
    forms["text alone"] = {
        name.replace("model.language_model.", "model."): value
        for name, value in forms["fused"].items()
        if "visual" not in name
    }
    if model_type == "qwen3_5_moe":
        prediction = {"mtp.layers.0.mlp.experts.0.up_proj.weight": np.zeros((2, 2), np.float32)}
        forms["with MTP"] = load_file(base / "model.safetensors") | prediction
    for form, tensors in forms.items():
        save_file(tensors, tmp_path / "model.safetensors")
        found = load_params(tmp_path, config, "float32")
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert (one == other).all(), form


def fused(tensors: dict[str, np.ndarray], experts: int) -> dict[str, np.ndarray]:
    """The experts of each layer as two tensors."""
    out = {name: value for name, value in tensors.items() if ".experts.0." not in name}
    for name in [name for name in tensors if name.endswith("experts.0.gate_proj.weight")]:
        parts = {
            part: np.stack([tensors[name.replace("0.gate_proj", f"{expert}.{part}")] for expert in range(experts)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        path = name.removesuffix(".0.gate_proj.weight")
        out[f"{path}.gate_up_proj"] = np.concatenate((parts["gate_proj"], parts["up_proj"]), axis=1)
        out[f"{path}.down_proj"] = parts["down_proj"]
        out = {key: value for key, value in out.items() if not key.startswith(path) or value.ndim == 3}
    return out


@pytest.mark.parity
@pytest.mark.slow
def test_merging_changes_the_embedding_under_the_wrappers_name_for_it(tmp_path):
    base = saved("qwen3_5_moe", tmp_path)
    config = read_model_config(base)
    [(key, weights)] = [item for item in random_adapter(config).weights.items() if item[0][1] == "embedding"]
    merge_adapter(LoRAAdapter("embedding", {key: weights}), base, tmp_path / "merged")
    before, after = (
        np.asarray(load_params(folder, config, "float32").embedding) for folder in (base, tmp_path / "merged")
    )
    assert_close(after, before + weights.delta(0).T, 1e-6)


@pytest.mark.parity
@pytest.mark.slow
def test_tensors_that_are_not_read_are_named(tmp_path):
    from contextlib import ExitStack

    base = saved("qwen3_5_moe", tmp_path)
    tensors = load_file(base / "model.safetensors") | {"mtp.fc.weight": np.zeros((2, 2), np.float32)}
    save_file(tensors, base / "model.safetensors")
    config = read_model_config(base)
    with ExitStack() as opened:
        unused = open_checkpoint(base, config, opened).unused
    assert unused["mtp.fc.weight"] == "layers that predict further tokens (MTP)"
    assert {name for name in tensors if "visual" in name} == {name for name, what in unused.items() if "vision" in what}
    save_file(tensors | {"model.audio.weight": np.zeros(2, np.float32)}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.audio\.weight"):
        load_params(base, config, "float32")
