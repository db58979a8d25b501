"""Copies of the base's embeddings beside an adapter's weights: equal ones are passed over, others are refused."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_moe_lora import AdapterFormatError, Model, create_bank, read_adapter, validate
from jax_moe_lora.adapters.formats import embedding_copies
from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.models.config_file import read_model_config
from support.checkpoints import write as write_checkpoint
from support.peft_files import WEIGHTS, pair, write_adapter

Q = pair("0.self_attn.q_proj", 16, 24)
EMBEDDINGS, HEAD = "base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"
BASE_LAYER = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("model")
    return folder, write_checkpoint(folder)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several pieces a tensor."""
    monkeypatch.setattr(embedding_copies, "_PIECE_VALUES", 100)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_equal_copies_of_the_bases_embeddings_are_passed_over(tmp_path, base, dtype):
    """Also in the dtype of the training, of which each value is the base's, rounded."""
    folder, tensors = base
    embeddings, head = (tensors[f"{name}.weight"].astype(dtype) for name in ("model.embed_tokens", "lm_head"))
    copies = {EMBEDDINGS: embeddings, BASE_LAYER: embeddings, HEAD: head}
    adapter = write_adapter(tmp_path / "adapter", {**Q, **copies})
    assert set(read_adapter(adapter, folder).weights) == {(0, "q")}
    assert validate(adapter, folder, deep=True) == []
    assert validate(adapter, folder) == []


def test_a_copy_of_a_tied_head_is_compared_with_the_embeddings(tmp_path):
    tensors = write_checkpoint(tmp_path / "model", dtype=np.float32)
    embeddings = tensors["model.embed_tokens.weight"]
    (tmp_path / "tied").mkdir()
    (tmp_path / "tied" / "config.json").write_text(
        (tmp_path / "model" / "config.json").read_text().replace("{", '{"tie_word_embeddings": true, ', 1)
    )
    save_file({name: t for name, t in tensors.items() if name != "lm_head.weight"}, tmp_path / "tied/model.safetensors")
    adapter = write_adapter(tmp_path / "adapter", {**Q, HEAD: embeddings})
    assert set(read_adapter(adapter, tmp_path / "tied").weights) == {(0, "q")}
    with pytest.raises(AdapterFormatError, match=r"lm_head\.weight differs from lm_head\.weight of the base"):
        read_adapter(adapter, tmp_path / "model")


@pytest.mark.parametrize("key", [EMBEDDINGS, BASE_LAYER, HEAD])
@pytest.mark.parametrize("fault", ["one value", "a row more", "NaN"])
def test_different_copies_are_refused_by_name(tmp_path, base, key, fault):
    folder, tensors = base
    copy = tensors["lm_head.weight" if key == HEAD else "model.embed_tokens.weight"].copy()
    if fault == "a row more":
        copy = np.concatenate([copy, copy[:1]])
    else:
        copy[29, 3] = np.nan if fault == "NaN" else np.nextafter(copy[29, 3], np.float32(9))
    adapter = write_adapter(tmp_path / "adapter", {**Q, key: copy})
    message = r"has shape \[33, 16\]" if fault == "a row more" else "in row 29 first"
    with pytest.raises(AdapterFormatError, match=message) as raised:
        read_adapter(adapter, folder)
    assert raised.value.key == key
    assert [finding.key for finding in validate(adapter, folder, deep=True)] == [key]


def test_a_copy_that_nothing_can_be_compared_with_is_refused_and_says_what_to_give(tmp_path, base):
    folder, tensors = base
    adapter = write_adapter(tmp_path / "adapter", {**Q, EMBEDDINGS: tensors["model.embed_tokens.weight"]})
    with pytest.raises(AdapterFormatError, match="give the folder of the base model's checkpoint"):
        read_adapter(adapter, read_model_config(folder))


def test_a_model_compares_copies_with_its_own_checkpoint(tmp_path, base):
    folder, tensors = base
    adapter = write_adapter(tmp_path / "adapter", {**Q, EMBEDDINGS: tensors["model.embed_tokens.weight"]})
    bank = create_bank({"up": Site(8, 8, 1, (0,))}, num_slots=1, max_rank=1)  # nothing is loaded into it
    model = Model(read_model_config(folder), None, bank, folder)
    model.register_adapter(adapter, "mine")
    assert set(model.adapter("mine").weights) == set(read_adapter(adapter, model).weights) == {(0, "q")}
    assert (adapter / WEIGHTS).is_file()
