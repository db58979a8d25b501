"""PEFT's `modules_to_save` of embedding and head, next to transformers and PEFT: tied and untied, mixed in a batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_moe_lora import AdapterFormatError, Model, merge_adapter, read_adapter
from support.layers import assert_close
from support.networks import TINY, load_peft, peft_logits, save_model, tiny

pytestmark = [
    pytest.mark.parity,
    pytest.mark.xdist_group("vocabulary"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.optimised,
]

CONFIGS: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},  # PEFT puts no LoRA on it
    "embedding": {"target_modules": ["q_proj"], "modules_to_save": ["model.embed_tokens"]},
    "both": {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "as one": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "beside lora": {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"], "r": 3},
    "lora": {"target_modules": ["lm_head", "embed_tokens", "v_proj"], "r": 5},
}
NAMES = [*CONFIGS, None]
TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (len(NAMES), 7))


def save_trained(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter with random matrices, by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(load_peft(base, None), LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("saved")
    base = save_model(tiny("qwen3_moe", num_hidden_layers=1, tie_word_embeddings=request.param), folder / "model")
    return base, {
        name: save_trained(base, folder / name, seed, **config) for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="module")
def model(trained: tuple[Path, dict[str, Path]]) -> Model:
    base, adapters = trained
    options = {"max_adapters": 6, "max_rank": 8, "adapter_targets": "all", "max_replacements": 6}
    model = Model.from_pretrained(base, dtype="float32", **options)
    for name, folder in adapters.items():
        model.load_adapter(folder, name)
    return model


def test_logits_equal_pefts_mixed_in_a_batch(trained: tuple[Path, dict[str, Path]], model: Model) -> None:
    base, adapters = trained
    mixed, plain = np.asarray(model.logits(TOKENS, NAMES)), np.asarray(model.logits(TOKENS, [None] * len(NAMES)))
    for row, name in enumerate(NAMES):
        expected = peft_logits(base, None if name is None else adapters[name], TOKENS[row : row + 1])[0]
        assert_close(mixed[row], expected, 1e-5)
    np.testing.assert_array_equal(mixed[-1], plain[-1])
    assert (np.abs(mixed[:-1] - plain[:-1]).max(axis=(1, 2)) > 1e-2).all(), "an adapter changes nothing"


def test_one_matrix_for_both_is_one_in_the_bank(trained: tuple[Path, dict[str, Path]], model: Model) -> None:
    matrix, tied = 4 * TINY["vocab_size"] * TINY["hidden_size"], model.config.tie_embeddings
    q_alone = 4 * 16 * 2 * TINY["hidden_size"]
    assert model.adapters["head"].nbytes == matrix + q_alone
    assert model.adapters["as one"].nbytes == matrix + q_alone
    assert model.adapters["both"].nbytes > 2 * matrix
    replaced = model.adapter("as one").replacements
    assert set(replaced) == ({"embedding", "head"} if tied else {"head"})


def test_greedy_answers_follow_the_logits(model: Model) -> None:
    answers = model.generate(TOKENS.tolist(), NAMES, max_new_tokens=3)
    whole = np.concatenate([TOKENS, [answer.token_ids for answer in answers]], axis=1)
    likeliest = np.asarray(model.logits(whole, NAMES)).argmax(-1)
    np.testing.assert_array_equal(likeliest[:, TOKENS.shape[1] - 1 : -1], whole[:, TOKENS.shape[1] :])


def test_what_is_written_is_what_peft_wrote(
    trained: tuple[Path, dict[str, Path]], model: Model, tmp_path: Path
) -> None:
    for name, layout in (("head", "peft"), ("both", "peft-per-expert"), ("as one", "peft")):
        model.save_adapter(name, tmp_path / name, layout)
        written, read = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / name, trained[1][name]))
        assert written.keys() == read.keys()
        for key, value in read.items():
            np.testing.assert_array_equal(written[key], value)
        saved = json.loads((tmp_path / name / "adapter_config.json").read_text())["modules_to_save"]
        assert set(saved) == {key.split(".")[-2] for key in read if "lora_" not in key}
    expected = np.asarray(model.logits(TOKENS[:1], ["as one"]))
    assert_close(peft_logits(trained[0], tmp_path / "as one", TOKENS[:1]), expected, 1e-5)


def test_merging_writes_the_matrix_or_says_that_the_weights_are_tied(
    trained: tuple[Path, dict[str, Path]], model: Model, tmp_path: Path
) -> None:
    base, adapters = trained
    for name in ("head", "both", "as one"):
        adapter = read_adapter(adapters[name], base)
        if model.config.tie_embeddings and name != "as one":
            with pytest.raises(AdapterFormatError, match="one tensor for both"):
                merge_adapter(adapter, base, tmp_path / name)
            continue
        merge_adapter(adapter, base, tmp_path / name)
        merged = np.asarray(Model.from_pretrained(tmp_path / name, dtype="float32").logits(TOKENS[:1]))
        assert_close(merged, np.asarray(model.logits(TOKENS[:1], [name])), 1e-5)
