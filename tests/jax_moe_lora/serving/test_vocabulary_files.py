"""Adapters on head and embedding, from PEFT's and Tinker's files, next to transformers and PEFT: tied and untied."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora import AdapterFormatError, InputError, Model, merge_adapter
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.inspect import inspect_folder
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import adapter_sites, layer_sites
from jax_moe_lora.training.spec import AdapterSpec
from support.layers import assert_close
from support.networks import EXPERTS, TINY, peft_logits, save_model, save_random_adapter, tiny

pytestmark = [
    pytest.mark.parity,
    pytest.mark.xdist_group("vocabulary"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.optimised,
]

TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (5, 7))
TARGETS = {
    "head": {"target_modules": ["lm_head"], "r": 4, "lora_alpha": 6},
    "embedding": {"target_modules": ["embed_tokens"], "r": 20, "lora_alpha": 20},
    "both": {"target_modules": ["lm_head", "embed_tokens", "q_proj"], "r": 3, "use_rslora": True},
    "experts": {"target_parameters": EXPERTS, "target_modules": ["lm_head"], "r": 2},
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("vocabulary")
    base = save_model(tiny("qwen3_moe", num_hidden_layers=2, tie_word_embeddings=request.param), folder / "model")
    adapters = {
        name: save_random_adapter(base, folder / name, seed, **config)
        for seed, (name, config) in enumerate(TARGETS.items())
    }
    for adapter in adapters.values():  # PEFT also saves the base model's own embeddings, which are not of the adapter
        file = adapter / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(file).items() if "lora_" in key}, file)
    return base, adapters


@pytest.fixture(scope="module")
def model(trained: tuple[Path, dict[str, Path]]) -> Model:
    base, adapters = trained
    model = Model.from_pretrained(base, dtype="float32", max_adapters=5, max_rank=32, adapter_targets="all")
    for name, folder in adapters.items():
        model.load_adapter(folder, name)
    return model


def test_logits_equal_pefts_mixed_in_a_batch(trained: tuple[Path, dict[str, Path]], model: Model) -> None:
    base, adapters = trained
    names = [*adapters, None]
    mixed = np.asarray(model.logits(TOKENS, names))
    for row, name in enumerate(names):
        expected = peft_logits(base, None if name is None else adapters[name], TOKENS[row : row + 1])[0]
        assert_close(mixed[row], expected, 1e-5)
    plain = np.asarray(model.logits(TOKENS, [None] * 5))
    np.testing.assert_array_equal(mixed[-1], plain[-1])
    assert (np.abs(mixed[:-1] - plain[:-1]).max(axis=(1, 2)) > 1e-2).all(), "an adapter changes nothing"


def test_greedy_answers_follow_the_logits(trained: tuple[Path, dict[str, Path]], model: Model) -> None:
    names = [*trained[1], None]
    answers = model.generate(TOKENS.tolist(), names, max_new_tokens=3)
    whole = np.concatenate([TOKENS, [answer.token_ids for answer in answers]], axis=1)
    likeliest = np.asarray(model.logits(whole, names)).argmax(-1)
    np.testing.assert_array_equal(likeliest[:, TOKENS.shape[1] - 1 : -1], whole[:, TOKENS.shape[1] :])


@pytest.mark.parametrize("layout", ["peft", "peft-per-expert"])
def test_what_is_written_is_read_as_the_same_adapter(
    trained: tuple[Path, dict[str, Path]], model: Model, tmp_path: Path, layout: str
) -> None:
    model.save_adapter("both", tmp_path / "out", layout)
    written, read = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", trained[1]["both"]))
    assert written.keys() == read.keys()
    for key, value in read.items():
        np.testing.assert_array_equal(written[key], value)
    summary = inspect_folder(tmp_path / "out")
    assert {module.module for module in summary.modules} == {"lm_head", "model.embed_tokens", "self_attn.q_proj"}
    assert summary.other_keys == []


def test_tinkers_layout_has_a_name_for_the_head_alone(model: Model, tmp_path: Path) -> None:
    model.save_adapter("head", tmp_path / "head", "tinker")
    keys = load_file(tmp_path / "head" / "adapter_model.safetensors").keys()
    assert keys == {f"base_model.model.model.unembed_tokens.lora_{side}.weight" for side in "AB"}
    for name, layout in (("embedding", "tinker"), ("head", "tensorrt-llm")):
        with pytest.raises(AdapterFormatError, match=f"{name}: this layout has no name for it"):
            model.save_adapter(name, tmp_path / "other", layout)


def test_merging_changes_these_weights_or_says_that_they_are_tied(
    trained: tuple[Path, dict[str, Path]], model: Model, tmp_path: Path
) -> None:
    base, adapters = trained
    both = read_adapter(adapters["both"], adapter_sites(model.config), adapter_names(model.config))
    if model.config.tie_embeddings:
        with pytest.raises(AdapterFormatError, match="one tensor for both"):
            merge_adapter(both, base, tmp_path / "out")
        return
    merge_adapter(both, base, tmp_path / "out")
    merged = np.asarray(Model.from_pretrained(tmp_path / "out", dtype="float32").logits(TOKENS))
    assert_close(merged, np.asarray(model.logits(TOKENS, ["both"] * 5)), 1e-5)


def test_training_refuses_these_modules_by_name(trained: tuple[Path, dict[str, Path]], model: Model) -> None:
    with pytest.raises(InputError, match="name 'head', which this model lacks"):
        AdapterSpec(rank=2, targets=("head",)).check("new", layer_sites(model.config))
    names = adapter_names(model.config)
    with pytest.raises(AdapterFormatError, match="adapters on the head are not supported here"):
        read_adapter(trained[1]["head"], layer_sites(model.config), names)


def test_a_tinker_file_with_unembed_tokens_is_that_adapter_on_the_head(
    trained: tuple[Path, dict[str, Path]], model: Model, tmp_path: Path
) -> None:
    _, adapters = trained
    tensors = load_file(adapters["head"] / "adapter_model.safetensors")
    renamed = {key.replace("lm_head", "model.unembed_tokens"): value for key, value in tensors.items()}
    assert set(renamed) == {f"base_model.model.model.unembed_tokens.lora_{side}.weight" for side in "AB"}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": "all-linear"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model.load_adapter(tmp_path, "tinker")
    try:
        found, expected = (np.asarray(model.logits(TOKENS, [name] * 5)) for name in ("tinker", "head"))
    finally:
        model.unload_adapter("tinker")
    np.testing.assert_array_equal(found, expected)


def test_an_adapter_that_is_tied_to_another_is_refused(
    trained: tuple[Path, dict[str, Path]], model: Model, tmp_path: Path
) -> None:
    folder = trained[1]["embedding"]
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"ensure_weight_tying": True}))
    with pytest.raises(AdapterFormatError, match="ensure_weight_tying"):
        model.load_adapter(tmp_path, "tied")
