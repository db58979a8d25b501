"""Whole modules in adapter files (`modules_to_save`): what is read, what is refused, what validation and others say."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora import AdapterFormatError, InputError, read_adapter, validate
from jax_moe_lora.adapters.formats.config_reading import read_peft_config
from jax_moe_lora.adapters.formats.detect import adapts_vocabulary, whole_matrices
from jax_moe_lora.adapters.validation.bank_rules import check_adapter
from jax_moe_lora.adapters.writing import write_adapter as write
from jax_moe_lora.inspect import inspect_folder
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import adapter_sites
from jax_moe_lora.training.start import read_starts
from support.checkpoints import write as write_checkpoint
from support.peft_files import WEIGHTS, pair, write_adapter

Q = pair("0.self_attn.q_proj", 16, 24)
EMBEDDING, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
NEW, OTHER = np.random.default_rng(1).standard_normal((2, 32, 16)).astype(np.float32)
BYTES = NEW.nbytes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("model")
    return folder, write_checkpoint(folder)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied")
    tensors = write_checkpoint(folder / "model")
    config = (folder / "model" / "config.json").read_text().replace("{", '{"tie_word_embeddings": true, ', 1)
    (folder / "config.json").write_text(config)
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, folder / "model.safetensors")
    return folder


def adapter(folder: Path, tensors: dict[str, np.ndarray], modules: Any = ("lm_head",), **config: Any) -> Path:
    saved = list(modules) if isinstance(modules, tuple) else modules
    return write_adapter(folder / "adapter", {**Q, **tensors}, modules_to_save=saved, **config)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_files_own_matrices_are_read_in_its_dtype(tmp_path, base, dtype):
    tensors = {EMBEDDING: NEW.astype(dtype), HEAD: OTHER.astype(dtype)}
    read = read_adapter(adapter(tmp_path, tensors, ("model.embed_tokens", "lm_head")), base[0])
    assert set(read.weights) == {(0, "q")}
    for module, key in (("embedding", EMBEDDING), ("head", HEAD)):
        np.testing.assert_array_equal(read.replacements[module], tensors[key])
        assert read.replacements[module].dtype == dtype
    assert whole_matrices(tmp_path / "adapter") == 2
    assert not adapts_vocabulary(tmp_path / "adapter")
    of_config = read_adapter(tmp_path / "adapter", read_model_config(base[0]))  # without weights to compare with
    assert of_config.replacements.keys() == read.replacements.keys()


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.language_model.embed_tokens.weight",
        "base_model.model.language_model.model.embed_tokens.weight",
    ],
)
def test_the_prefix_of_a_model_with_an_image_part_is_passed_over(tmp_path, base, key):
    modules = (key.removeprefix("base_model.model.").removesuffix(".weight"),)
    folder = adapter(tmp_path, {key: NEW}, modules, target_modules=["q_proj", "embed_tokens"])
    np.testing.assert_array_equal(read_adapter(folder, base[0]).replacements["embedding"], NEW)
    assert not read_peft_config(folder).targets_module(modules[0])


def test_a_matrix_that_equals_the_base_models_takes_no_room(tmp_path, base):
    folder, tensors = base
    written = adapter(tmp_path, {HEAD: tensors["lm_head.weight"], EMBEDDING: NEW}, ("lm_head", "embed_tokens"))
    assert set(read_adapter(written, folder).replacements) == {"embedding"}


def test_peft_puts_no_lora_on_a_module_that_it_saves(tmp_path, base):
    written = adapter(tmp_path, {HEAD: NEW}, target_modules=["q_proj", "lm_head"])
    assert set(read_adapter(written, base[0]).replacements) == {"head"}


def test_one_matrix_is_both_where_the_weights_are_tied_and_the_config_says_so(tmp_path, base, tied):
    both, fields = {EMBEDDING: NEW, HEAD: NEW}, {"ensure_weight_tying": True}
    one = adapter(tmp_path / "one", {EMBEDDING: NEW}, ("embed_tokens",), **fields)
    two = adapter(tmp_path / "two", both, ("model.embed_tokens",), **fields)  # as PEFT writes it
    for folder, model in ((one, tied), (two, tied), (two, read_model_config(tied))):
        read = read_adapter(folder, model).replacements
        assert read["embedding"] is read["head"]
        np.testing.assert_array_equal(read["head"], NEW)
    assert set(read_adapter(one, base[0]).replacements) == {"embedding"}  # not tied: as it is
    with pytest.raises(AdapterFormatError, match="only its checkpoint tells; give its folder"):
        read_adapter(one, read_model_config(tied))
    other = adapter(tmp_path / "other", {EMBEDDING: NEW, HEAD: OTHER}, ("embed_tokens", "lm_head"), **fields)
    with pytest.raises(AdapterFormatError, match="other values for the two"):
        read_adapter(other, tied)
    alone = adapter(tmp_path / "alone", {EMBEDDING: NEW, HEAD: OTHER}, ("embed_tokens", "lm_head"))
    assert set(read_adapter(alone, tied).replacements) == {"embedding", "head"}
    for folder in (one, two):
        found = validate(folder, tied, dtype="float32")
        assert {(f.severity, "2.0 KiB" in f.message) for f in found} == {("warning", True)}


LORA = {
    "base_model.model.lm_head.lora_A.weight": np.ones((2, 16), np.float32),
    "base_model.model.lm_head.lora_B.weight": np.ones((32, 2), np.float32),
}
ROWS = {"base_model.model.lm_head.token_adapter.trainable_tokens_delta": NEW[:1]}
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no tensor": ({"tensors": {}}, r"modules_to_save names lm_head, and .* holds no lm_head\.weight"),
    "another shape": ({"tensors": {HEAD: NEW[:31]}}, r"shape \[31, 16\]; expected \[32, 16\]"),
    "a dtype": ({"tensors": {HEAD: NEW.astype(np.float64)}}, "dtype F64"),
    "not named": ({"tensors": {HEAD: NEW}, "modules": None}, r"take 2\.0 KiB .* name it in modules_to_save"),
    "a bias": ({"tensors": {HEAD: NEW, HEAD.replace("weight", "bias"): NEW[0]}}, "biases are not supported"),
    "LoRA too": ({"tensors": {HEAD: NEW, **LORA}}, "replaces the whole head, and PEFT puts no LoRA on it"),
    "tokens too": (
        {"tensors": {HEAD: NEW, **ROWS}, "trainable_token_indices": {"lm_head": [3]}},
        "has LoRA or trained tokens for it too",
    ),
    "twice": (
        {"tensors": {HEAD: NEW, HEAD.replace("lm_head", "language_model.lm_head"): NEW}},
        r"lm_head\.weight holds the lm_head too",
    ),
    "another module": ({"tensors": {HEAD: NEW}, "modules": ("lm_head", "score")}, "names 'score'"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_and_validation_says_the_same(tmp_path, base, case):
    arguments, message = REFUSALS[case]
    folder = adapter(tmp_path, **arguments)
    with pytest.raises(AdapterFormatError, match=message) as raised:
        read_adapter(folder, base[0])
    assert str(raised.value) in [finding.message for finding in validate(folder, base[0], deep=case == "not named")]


def test_values_that_are_not_finite_are_refused_by_the_bank_and_by_deep_validation(tmp_path, base):
    poisoned = NEW.copy()
    poisoned[30, 2] = np.nan
    folder = adapter(tmp_path, {HEAD: poisoned})
    sites = adapter_sites(read_model_config(base[0]))
    with pytest.raises(AdapterFormatError, match="head: it holds values that are not finite in float32"):
        check_adapter(read_adapter(folder, base[0]), sites, 8, np.dtype(np.float32))
    assert [f.key for f in validate(folder, base[0], deep=True) if f.severity == "error"] == [HEAD]


def test_validation_and_inspection_say_what_the_file_holds(tmp_path, base):
    folder = adapter(tmp_path, {HEAD: NEW})
    for deep in (False, True):
        (finding,) = validate(folder, base[0], deep=deep, dtype="float32")
        assert (finding.severity, finding.key) == ("warning", HEAD)
        assert "2.0 KiB" in finding.message
        assert "max_replacements" in finding.message
    summary = inspect_folder(folder)
    (whole,) = [module for module in summary.modules if module.form == "whole matrix"]
    assert (whole.module, whole.shape_b, whole.ranks, whole.nbytes) == ("lm_head", [32, 16], [], BYTES)
    assert summary.other_keys == []


def test_training_does_not_start_from_them(tmp_path, base):
    with pytest.raises(AdapterFormatError, match="adapters on the head are not supported here"):
        read_starts({"mine": adapter(tmp_path, {HEAD: NEW})}, read_model_config(base[0]))


def test_layouts_without_a_name_for_them_refuse_to_write_them(tmp_path, base):
    config = read_model_config(base[0])
    read = read_adapter(adapter(tmp_path, {HEAD: NEW, EMBEDDING: NEW}, ("lm_head", "embed_tokens")), base[0])
    options = adapter_sites(config), adapter_names(config)
    for layout in ("tinker", "tensorrt-llm"):
        with pytest.raises(AdapterFormatError, match="this layout has no whole matrices"):
            write(read, tmp_path / layout, *options, layout)
    write(read, tmp_path / "again", *options, "peft")
    written, expected = (load_file(tmp_path / name / WEIGHTS) for name in ("again", "adapter"))
    assert written.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(written[key], value)
    again = read_adapter(tmp_path / "again", base[0])
    assert again.replacements.keys() == read.replacements.keys()


def test_a_replacement_that_is_no_array_is_refused(tmp_path, base):
    from dataclasses import replace

    read = read_adapter(adapter(tmp_path, {HEAD: NEW}), base[0])
    with pytest.raises(InputError, match="the head of a replacement has dtype int"):
        replace(read, replacements={"head": np.ones((32, 16), np.int32)})
