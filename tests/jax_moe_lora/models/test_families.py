"""Each family beside Qwen3-MoE against transformers + PEFT in float32: prompts and decode steps, adapters mixed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import Functional, Model
from jax_moe_lora.models.decoder import Cache
from support.layers import assert_close
from support.networks import ATTENTION, EXPERTS, peft_logits, save_model, save_random_adapter, split_to_per_expert, tiny

pytestmark = [pytest.mark.parity, pytest.mark.xdist_group("families")]

SHARED = [f"shared_expert.{part}_proj" for part in ("gate", "up", "down")]
# A window of as many positions as the model has changes nothing.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": 128},
    "olmoe": {"clip_qkv": 0.5, "attention_bias": True},
    "qwen2_moe": {"mlp_only_layers": [1]},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "experts": {"r": 4, "lora_alpha": 16, "target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    "both": {"r": 5, "use_rslora": True, "target_modules": ATTENTION, "target_parameters": EXPERTS},
    "linear": {"r": 3, "target_modules": "all-linear"},
}
SHARED_ADAPTERS: dict[str, dict[str, Any]] = {
    "shared": {"r": 6, "target_modules": [*SHARED, "shared_expert_gate", "q_proj"], "target_parameters": EXPERTS},
    "shared-up": {"r": 2, "target_modules": [SHARED[1]]},
}
LENGTH, DECODED = 16, 3


@dataclass(frozen=True)
class Served:
    """A model with adapters, a row of tokens for each adapter, and each row's logits by transformers and PEFT alone."""

    base: Path
    paths: dict[str | None, Path | None]
    model: Model
    fn: Functional
    prefill: Callable[..., Any]
    tokens: np.ndarray
    expected: list[np.ndarray]

    def read(self, lengths: np.ndarray) -> tuple[Cache, jax.Array]:
        slots = self.model.slots(list(self.paths))
        arguments = jnp.asarray(self.tokens), jnp.asarray(lengths), slots
        return self.prefill(self.fn.params, self.fn.bank, self.fn.init_cache(), *arguments)

    def logits_after(self, lengths: np.ndarray) -> np.ndarray:
        """What is expected after so many tokens of each row."""
        return np.stack([own[length - 1] for own, length in zip(self.expected, lengths, strict=True)])


@pytest.fixture(scope="module", params=FAMILIES)
def served(request, tmp_path_factory) -> Served:
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    base = save_model(tiny(family, num_hidden_layers=2, **FAMILIES[family]), folder / "model")
    paths: dict[str | None, Path | None] = {None: None}
    for seed, (name, config) in enumerate((ADAPTERS | (SHARED_ADAPTERS if family == "qwen2_moe" else {})).items()):
        paths[name] = save_random_adapter(base, folder / name, seed, **config)
    files = paths | {"per_expert": split_to_per_expert(paths["experts"], folder / "split", 8, family == "mixtral")}
    # PEFT cannot read the per-expert form on transformers 5; its arithmetic is that of the file it was split from.
    paths["per_expert"] = paths["experts"]
    model = Model.from_pretrained(base, dtype="float32", max_adapters=8, max_rank=8)
    for name, path in files.items():
        if name is not None:
            model.load_adapter(path, adapter_name=name)
    fn = model.functional(batch=len(paths), max_length=LENGTH)
    tokens = np.random.default_rng(0).integers(0, 99, (len(paths), LENGTH))
    expected = [peft_logits(base, path, row[None])[0] for path, row in zip(paths.values(), tokens, strict=True)]
    return Served(base, paths, model, fn, jax.jit(fn.prefill), tokens, expected)


@pytest.mark.parametrize("shortest", [1, pytest.param(6, marks=pytest.mark.slow), LENGTH])
def test_prompts_of_mixed_adapters_equal_each_ones_own_run(served, shortest):
    lengths = np.minimum(shortest + np.arange(len(served.paths)), LENGTH)
    assert_close(served.read(lengths)[1], served.logits_after(lengths), 1e-5)


def test_adapters_change_what_is_compared(served):
    for name, row, own in zip(served.paths, served.tokens, served.expected, strict=True):
        if name is not None:
            without = peft_logits(served.base, None, row[None])[0]
            assert np.linalg.norm(own - without) > 1e-2 * np.linalg.norm(without), name


@pytest.mark.slow
def test_decode_steps_equal_the_whole_prompts(served):
    lengths = LENGTH - DECODED - np.arange(len(served.paths))
    cache, _ = served.read(lengths)
    slots, rows, decode = served.model.slots(list(served.paths)), np.arange(len(lengths)), jax.jit(served.fn.decode)
    for place in (lengths + step for step in range(DECODED)):
        tokens = jnp.asarray(served.tokens[rows, place])
        cache, scores = decode(served.fn.params, served.fn.bank, cache, tokens, slots)
        assert_close(scores, served.logits_after(place + 1), 1e-5)


def test_clipping_changes_what_is_compared(tmp_path):
    """Otherwise the parity of OLMoE's `clip_qkv` would prove nothing."""
    tokens = np.arange(10)[None]
    clipped, whole = (
        peft_logits(save_model(tiny("olmoe", num_hidden_layers=2, clip_qkv=clip), tmp_path / str(clip)), None, tokens)
        for clip in (FAMILIES["olmoe"]["clip_qkv"], None)
    )
    assert np.linalg.norm(clipped - whole) > 1e-2 * np.linalg.norm(whole)
