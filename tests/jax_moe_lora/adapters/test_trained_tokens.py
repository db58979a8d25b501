"""Rows of tokens in adapter files: what they become, what is refused, what inspection and validation say."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, read_adapter, validate, validate_config
from jax_moe_lora.adapters.formats.detect import adapts_vocabulary
from jax_moe_lora.adapters.validation.bank_rules import check_adapter
from jax_moe_lora.inspect import inspect_folder
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.sites import adapter_sites
from jax_moe_lora.training.start import read_starts
from support.checkpoints import write as write_checkpoint
from support.peft_files import pair, write_adapter

Q = pair("0.self_attn.q_proj", 16, 24)
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD_ROWS = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"
IDS = [31, 4, 0]
NEW = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("model")
    return folder, write_checkpoint(folder)


def adapter(tmp_path: Path, ids: Any = IDS, rows: np.ndarray = NEW, key: str = ROWS, **config: Any) -> Path:
    return write_adapter(tmp_path / "adapter", {**Q, key: rows}, trainable_token_indices=ids, **config)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("module", ["embedding", "head"])
def test_the_rows_of_these_tokens_are_replaced_and_no_others(tmp_path, base, module, dtype):
    folder, tensors = base
    rows, key = NEW.astype(dtype), ROWS if module == "embedding" else HEAD_ROWS
    name = "embed_tokens" if module == "embedding" else "lm_head"
    read = read_adapter(adapter(tmp_path, {name: IDS}, rows, key), folder)
    assert set(read.weights) == {(0, "q"), (2, module)}
    weight = tensors[f"{'model.' if module == 'embedding' else ''}{name}.weight"].astype(np.float32)
    update = read.weights[2, module].delta(0)
    expected = weight.copy()
    expected[IDS] = rows.astype(np.float32)
    np.testing.assert_allclose(weight + (update.T if module == "embedding" else update), expected, rtol=0, atol=1e-6)
    assert read.weights[2, module].max_rank == 3
    assert adapts_vocabulary(tmp_path / "adapter")


def test_lora_on_the_same_module_is_added_to_the_new_rows(tmp_path, base):
    folder, _ = base
    random = np.random.default_rng(2)
    lora = {
        "base_model.model.lm_head.lora_A.weight": random.standard_normal((2, 16)).astype(np.float16),
        "base_model.model.lm_head.lora_B.weight": random.standard_normal((32, 2)).astype(np.float16),
    }
    config = {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 3}
    updates = []
    for name, tensors, ids in (
        ("lora", lora, None),
        ("rows", {HEAD_ROWS: NEW}, IDS),
        ("all", {**lora, HEAD_ROWS: NEW}, IDS),
    ):
        targets = config if name != "rows" else {}
        fields = {} if ids is None else {"trainable_token_indices": {"lm_head": ids}}
        written = write_adapter(tmp_path / name, {**Q, **tensors}, **targets, **fields)
        updates.append(read_adapter(written, folder).weights[2, "head"])
    assert updates[2].max_rank == 5
    np.testing.assert_allclose(updates[2].delta(0), updates[0].delta(0) + updates[1].delta(0), rtol=0, atol=1e-6)


REFUSALS = {
    "past the vocabulary": ({"ids": [1, 32, 2]}, r"has 32, and the model has the tokens 0 to 31"),
    "repeated": ({"ids": [1, 2, 1]}, "each of them once"),
    "negative": ({"ids": [1, -2, 3]}, "each of them once"),
    "not whole": ({"ids": [1, 2.5, 3]}, "each of them once"),
    "a number": ({"ids": 7}, "a list of token ids, or an object"),
    "another module": ({"ids": {"q_proj": IDS}}, "ids for embed_tokens or lm_head"),
    "one module twice": ({"ids": {"embed_tokens": IDS, "model.embed_tokens": IDS}}, "each of them once"),
    "too many": ({"ids": list(range(513))}, "at most 512 token ids, not 513"),
    "an id less": ({"ids": [1, 2]}, r"shape \[3, 16\]; expected \[2, 16\], a row for each id"),
    "another width": ({"rows": NEW[:, :15]}, r"shape \[3, 15\]; expected \[3, 16\]"),
    "one axis": ({"rows": NEW[0]}, r"shape \[16\]; expected \[3, 16\]"),
    "no ids": ({"ids": None}, "adapter_config.json has no trainable_token_indices for it"),
    "ids of the other module": (
        {"ids": {"lm_head": IDS}},
        "ids for lm_head, and adapter_model.safetensors holds no rows",
    ),
    "a dtype": ({"rows": NEW.astype(np.float64)}, "dtype F64"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_and_validation_says_the_same(tmp_path, base, case):
    arguments, message = REFUSALS[case]
    folder = adapter(tmp_path, **arguments)
    with pytest.raises(AdapterFormatError, match=message) as raised:
        read_adapter(folder, base[0])
    assert str(raised.value) in [finding.message for finding in validate(folder, base[0])]


def test_without_the_base_models_rows_it_is_refused_and_says_what_to_give(tmp_path, base):
    with pytest.raises(AdapterFormatError, match="give the folder of the base model's checkpoint"):
        read_adapter(adapter(tmp_path), read_model_config(base[0]))


def test_training_does_not_start_from_them(tmp_path, base):
    with pytest.raises(AdapterFormatError, match="adapters on the embedding are not supported here"):
        read_starts({"mine": adapter(tmp_path)}, read_model_config(base[0]))


def test_a_base_model_with_other_embeddings_is_refused(tmp_path, base):
    other = tmp_path / "other"
    write_checkpoint(other)
    for file in other.glob("*.safetensors"):
        file.unlink()
    (other / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(AdapterFormatError, match="give the folder of the base model's checkpoint"):
        read_adapter(adapter(tmp_path), other)


def test_rows_that_are_not_finite_are_refused_by_the_bank_and_by_deep_validation(tmp_path, base):
    folder, rows = base[0], NEW.copy()
    rows[1, 2] = np.inf
    read = read_adapter(adapter(tmp_path, rows=rows), folder)
    sites = adapter_sites(read_model_config(folder))
    with pytest.raises(AdapterFormatError, match=r"embedding: B holds values that are not finite"):
        check_adapter(read, sites, 8, np.dtype(np.float32))
    assert [f.key for f in validate(tmp_path / "adapter", folder, deep=True) if f.severity == "error"] == [ROWS]


def test_more_tokens_than_ranks_are_refused_with_the_reason(tmp_path, base):
    folder = base[0]
    written, sites = adapter(tmp_path), adapter_sites(read_model_config(folder))
    expected = r"rank is 3; the bank takes at most 2 \(raise max_rank\)\. Each trained token .* takes a rank"
    with pytest.raises(AdapterFormatError, match=expected):
        check_adapter(read_adapter(written, folder), sites, 2, np.dtype(np.float32))
    (finding,) = [f for f in validate(written, folder, max_rank=2) if f.severity == "error"]
    assert finding.key == ROWS
    assert "takes a rank" in finding.message


def test_validation_and_inspection_say_what_the_file_holds(tmp_path, base):
    folder = adapter(tmp_path)
    for deep in (False, True):
        (finding,) = validate(folder, base[0], deep=deep)
        assert finding.severity == "warning"
        assert "adapter_targets='all'" in finding.message
    summary = inspect_folder(folder)
    (tokens,) = [module for module in summary.modules if module.form == "trained tokens"]
    assert (tokens.module, tokens.shape_b, tokens.ranks, tokens.nbytes) == ("model.embed_tokens", [3, 16], [3], 192)
    assert summary.other_keys == []


def test_a_config_is_checked_before_there_is_a_file(base):
    fields = {"target_modules": ["q_proj"], "r": 2, "lora_alpha": 2}
    assert validate_config({**fields, "trainable_token_indices": IDS}, base[0]) == []
    (few,) = validate_config({**fields, "trainable_token_indices": IDS}, base[0], max_rank=2)
    (past,) = validate_config({**fields, "trainable_token_indices": {"lm_head": [32]}}, base[0])
    assert "3 trained tokens, each of which takes a rank" in few.message
    assert "the model has the tokens 0 to 31" in past.message
