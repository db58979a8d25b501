"""Logits and greedy text against transformers + PEFT, in float32, on random checkpoints written by them."""

from pathlib import Path

import numpy as np
import pytest

from jax_moe_lora import Model
from support.networks import (
    ATTENTION,
    EXPERTS,
    load_peft,
    peft_logits,
    save_model,
    save_random_adapter,
    split_to_per_expert,
    tiny,
)

pytestmark = [pytest.mark.parity, pytest.mark.xdist_group("parity")]

SHAPES = {
    "plain": {},
    "no-renormalise-dense-layer": {"norm_topk_prob": False, "mlp_only_layers": [0]},
    "sparse-step-tied": {"decoder_sparse_step": 2, "tie_word_embeddings": True, "num_experts": 4, "hidden_size": 48},
    "yarn-bias": {
        "attention_bias": True,
        "num_experts_per_tok": 4,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}
ADAPTERS = {
    "experts": {"r": 4, "lora_alpha": 16, "target_parameters": EXPERTS},
    "all": {
        "r": 20,
        "use_rslora": True,
        "target_modules": ATTENTION,
        "target_parameters": [*EXPERTS, "mlp.gate.weight"],
    },
    "attention": {"r": 3, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "down": {"r": 8, "target_parameters": ["mlp.experts.down_proj"], "rank_pattern": {".*layers.1.*": 17}},
    "gate_up": {
        "r": 8,
        "target_parameters": ["mlp.experts.gate_up_proj"],
        "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 3},
    },
}


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=SHAPES)
def served(request, tmp_path_factory) -> tuple[Path, dict[str | None, Path | None], Model]:
    folder = tmp_path_factory.mktemp(request.param)
    network = tiny("qwen3_moe", num_hidden_layers=2, **SHAPES[request.param])
    base = save_model(network, folder / "model")
    adapters: dict[str | None, Path | None] = {None: None}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        adapters[name] = save_random_adapter(base, folder / name, seed, **config)
    adapters["per_expert"] = split_to_per_expert(
        adapters["experts"], folder / "per_expert", network.config.num_local_experts
    )
    model = Model.from_pretrained(base, dtype="float32", max_adapters=len(adapters), max_rank=32)
    for name, path in adapters.items():
        if name is not None:
            model.load_adapter(path, adapter_name=name)
    return base, adapters, model


def test_mixed_batch_equals_each_adapters_own_peft_run(served):
    base, adapters, model = served
    names = [*adapters, None]
    tokens = np.random.default_rng(0).integers(0, 99, (len(names), 20))
    lengths = [20, 7, 20, 13, 20, 9, 20, 5][: len(names)]
    mixed = np.asarray(model.logits(tokens, names, lengths))
    for row, name in enumerate(names):
        # PEFT cannot read the per-expert form on transformers 5; its arithmetic is that of the file it was split from.
        path = adapters["experts" if name == "per_expert" else name]
        expected = peft_logits(base, path, tokens[row : row + 1, : lengths[row]])[0]
        error = relative_error(mixed[row, : lengths[row]], expected)
        assert error <= 1e-5, f"{name}: relative error {error:.2e}"
    base_row = peft_logits(base, None, tokens[1:2, :7])[0]
    assert relative_error(mixed[1, :7], base_row) > 1e-3, "the adapters change nothing, so this proves nothing"


# Prefill has compared every shape; decoding adds the cache and the positions.
@pytest.mark.slow
@pytest.mark.parametrize("served", ["plain", "yarn-bias"], indirect=True)
def test_greedy_text_is_that_of_peft(served):
    import torch

    base, adapters, model = served
    rng = np.random.default_rng(1)
    names = [None, "experts", "all"]
    prompts = [rng.integers(0, 99, size).tolist() for size in (5, 11, 8)]
    outs = model.generate(prompts, names, max_new_tokens=12)
    for prompt, name, out in zip(prompts, names, outs, strict=True):
        network = load_peft(base, adapters[name])
        with torch.no_grad():
            expected = network.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
            )
        assert out.token_ids == expected[0, len(prompt) :].tolist(), name
