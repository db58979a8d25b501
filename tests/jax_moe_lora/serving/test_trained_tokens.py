"""PEFT's trained tokens, next to transformers and PEFT: list and object, tied and untied, beside LoRA on the head."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora import AdapterFormatError, Model, merge_adapter, read_adapter
from support.layers import assert_close
from support.networks import TINY, load_peft, peft_logits, save_model, tiny

pytestmark = [
    pytest.mark.parity,
    pytest.mark.xdist_group("vocabulary"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.optimised,
]

IDS = [3, 98, 0, 41]
TOKENS = np.concatenate([np.random.default_rng(0).integers(0, TINY["vocab_size"], (6, 5)), [IDS] * 6], axis=1)
CONFIGS = {
    "list": {"target_modules": ["q_proj"], "trainable_token_indices": IDS},
    "both": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": IDS, "lm_head": IDS}},
    "apart": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": IDS, "lm_head": [7, 3]}},
    "head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5]}},
    # Where the weights are tied, PEFT puts the rows below the head's LoRA.
    "beside lora": {"target_modules": ["lm_head"], "r": 3, "lora_alpha": 5, "trainable_token_indices": IDS},
}
NAMES = [*CONFIGS, None]


def save_trained(base: Path, folder: Path, seed: int, **config) -> Path:
    """An adapter with random matrices and rows, by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    wrapped = get_peft_model(load_peft(base, None), LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "trainable_tokens_delta" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("tokens")
    base = save_model(tiny("qwen3_moe", num_hidden_layers=1, tie_word_embeddings=request.param), folder / "model")
    return base, {
        name: save_trained(base, folder / name, seed, **config) for seed, (name, config) in enumerate(CONFIGS.items())
    }


@pytest.fixture(scope="module")
def model(trained: tuple[Path, dict[str, Path]]) -> Model:
    base, adapters = trained
    model = Model.from_pretrained(base, dtype="float32", max_adapters=6, max_rank=16, adapter_targets="all")
    for name, folder in adapters.items():
        model.load_adapter(folder, name)
    return model


def test_logits_equal_pefts_mixed_in_a_batch(trained: tuple[Path, dict[str, Path]], model: Model) -> None:
    base, adapters = trained
    mixed, plain = np.asarray(model.logits(TOKENS, NAMES)), np.asarray(model.logits(TOKENS, [None] * 6))
    for row, name in enumerate(NAMES):
        expected = peft_logits(base, None if name is None else adapters[name], TOKENS[row : row + 1])[0]
        assert_close(mixed[row], expected, 1e-5)
    np.testing.assert_array_equal(mixed[-1], plain[-1])
    assert (np.abs(mixed[:-1] - plain[:-1]).max(axis=(1, 2)) > 1e-2).all(), "an adapter changes nothing"


def test_what_is_written_is_lora_that_peft_reads_with_the_same_logits(
    trained: tuple[Path, dict[str, Path]], model: Model, tmp_path: Path
) -> None:
    for row, name in enumerate(("apart", "beside lora")):
        model.save_adapter(name, tmp_path / name)
        assert not json.loads((tmp_path / name / "adapter_config.json").read_text()).get("trainable_token_indices")
        expected = np.asarray(model.logits(TOKENS[row : row + 1], [name]))
        assert_close(peft_logits(trained[0], tmp_path / name, TOKENS[row : row + 1]), expected, 1e-5)


def test_merging_writes_the_rows_or_says_that_the_weights_are_tied(
    trained: tuple[Path, dict[str, Path]], model: Model, tmp_path: Path
) -> None:
    base, adapters = trained
    adapter = read_adapter(adapters["list"], base)
    if model.config.tie_embeddings:
        with pytest.raises(AdapterFormatError, match="one tensor for both"):
            merge_adapter(adapter, base, tmp_path / "out")
        return
    merge_adapter(adapter, base, tmp_path / "out")
    merged = np.asarray(Model.from_pretrained(tmp_path / "out", dtype="float32").logits(TOKENS[:1]))
    assert_close(merged, np.asarray(model.logits(TOKENS[:1], ["list"])), 1e-5)


def test_copies_of_the_base_model_beside_the_rows_are_passed_over(
    trained: tuple[Path, dict[str, Path]], model: Model, tmp_path: Path
) -> None:
    """As PEFT writes them with `save_embedding_layers=True`; of a tied head, with a copy of the rows."""
    base, adapters = trained
    head = "base_model.model.lm_head.token_adapter"
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"

    def changed(tensors: dict[str, np.ndarray], name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_bytes((adapters["list"] / "adapter_config.json").read_bytes())
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    embeddings = load_peft(base, None).get_input_embeddings().weight.detach().numpy()
    tensors = load_file(adapters["list"] / "adapter_model.safetensors")
    tensors |= {rows.replace("trainable_tokens_delta", "base_layer.weight"): embeddings}
    if model.config.tie_embeddings:
        tensors |= {f"{head}.base_layer.weight": embeddings, f"{head}.trainable_tokens_delta": tensors[rows]}
    weights = read_adapter(changed(tensors, "copies"), base).weights
    expected = read_adapter(adapters["list"], base).weights
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(weights[key].delta(0), value.delta(0))
    tensors[f"{head}.trainable_tokens_delta"] = tensors[rows] + 1
    message = "whose rows differ here" if model.config.tie_embeddings else "has no trainable_token_indices for it"
    with pytest.raises(AdapterFormatError, match=message):
        read_adapter(changed(tensors, "other"), base)
