"""Adapters on the embedding and on the head: what they compute, next to what changed weights compute."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import LoRAAdapter
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import LoRAWeights, uniform
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import ModelParams, init_params
from jax_moe_lora.models.specs.model import ModelConfig
from support.layers import assert_close
from support.models import decoder_config

pytestmark = pytest.mark.optimised

MOE = MoEConfig(hidden_size=16, expert_width=12, num_experts=3, top_k=2)
TOKENS = np.random.default_rng(0).integers(0, 37, (4, 5)).astype(np.int32)
LENGTHS = np.full(4, 5, np.int32)
MODULES = {"embedding": ("embedding",), "head": ("head",), "both": ("embedding", "head")}


def make(tied: bool) -> tuple[ModelConfig, ModelParams]:
    config = replace(decoder_config("qwen3_moe", 37, 16, (2, 1, 8), MOE), tie_embeddings=tied)
    params = init_params(config, jax.random.key(0), "float32")
    return config, jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, params)


def adapter(modules: tuple[str, ...], rank: int, seed: int, scale: float = 0.5) -> LoRAAdapter:
    random = np.random.default_rng(seed)
    widths = {"embedding": (37, 16), "head": (16, 37)}
    weights: dict[tuple[int, str], LoRAWeights] = {}
    for module in modules:
        into, out = widths[module]
        a, b = (random.normal(size=shape).astype(np.float32) for shape in ((1, rank, into), (1, out, rank)))
        weights[1, module] = uniform(a, b, scale, 1)
    return LoRAAdapter("some", weights)


def with_weights(params: ModelParams, config: ModelConfig, adapter: LoRAAdapter) -> tuple[ModelParams, ModelConfig]:
    """The model whose weights are changed as the adapter says, its head and embedding untied."""
    embedding = np.asarray(params.embedding)
    head = embedding if params.head is None else np.asarray(params.head)
    if weights := adapter.weights.get((1, "embedding")):
        embedding = embedding + weights.delta(0).T
    if weights := adapter.weights.get((1, "head")):
        head = head + weights.delta(0)
    changed = replace(params, embedding=jnp.asarray(embedding), head=jnp.asarray(head))
    return changed, replace(config, tie_embeddings=False)


RUN = jax.jit(decoder.logits, static_argnames="config")


def logits(params: ModelParams, config: ModelConfig, bank: Any, slots: list[int]) -> np.ndarray:
    arguments = params, bank, jnp.asarray(TOKENS), jnp.asarray(LENGTHS), jnp.asarray(slots, jnp.int32)
    return np.asarray(RUN(*arguments, config=config))


def bank_of(config: ModelConfig, adapters: dict[int, LoRAAdapter], slots: int = 3, memory: int | None = None) -> Any:
    bank = create_bank(decoder.adapter_sites(config), slots, 64, memory, "float32")
    for slot, each in adapters.items():
        bank = insert(bank, slot, each)
    return bank


FORMS = {"a block per slot": (3, None), "more slots than rows": (24, None), "the whole pool": (3, 170_000)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_adapter_on_embedding_or_head_is_that_weight_changed_mixed_in_a_batch(tied: bool, form: str) -> None:
    config, params = make(tied)
    adapters = {0: adapter(("embedding",), 5, 1), 1: adapter(("head",), 20, 2), 2: adapter(MODULES["both"], 3, 3)}
    slots, memory = FORMS[form]
    bank = bank_of(config, adapters, slots, memory)
    pages_of_all_blocks = min(slots, len(TOKENS) * TOKENS.shape[1]) * 4
    assert (len(bank.pages[37]) <= pages_of_all_blocks) is (form == "the whole pool")
    mixed = logits(params, config, bank, [0, 1, 2, -1])
    for slot, each in adapters.items():
        expected = logits(*with_weights(params, config, each), None, [-1] * 4)
        assert_close(mixed[slot], expected[slot], 1e-5)
    base = logits(params, config, None, [-1] * 4)
    np.testing.assert_array_equal(mixed[3], base[3])
    assert np.abs(mixed[:3] - base[:3]).max(axis=(1, 2)).min() > 0.1


@pytest.mark.parametrize("modules", MODULES.values(), ids=MODULES)
def test_a_row_does_not_see_the_other_rows_adapters(modules: tuple[str, ...]) -> None:
    config, params = make(tied=False)
    bank = bank_of(config, {slot: adapter(modules, 4 + 13 * slot, slot) for slot in range(2)})
    mixed = logits(params, config, bank, [0, 1, -1, 7])
    for row, slot in enumerate((0, 1)):
        solo = logits(params, config, bank, [slot if other == row else -1 for other in range(4)])
        np.testing.assert_array_equal(mixed[row], solo[row])
    base = logits(params, config, None, [-1] * 4)
    np.testing.assert_array_equal(mixed[2:], base[2:])  # a slot out of range is a base row


def test_prefill_append_and_decode_compute_what_all_positions_do() -> None:
    config, params = make(tied=True)
    bank = bank_of(config, {0: adapter(MODULES["both"], 5, 1), 2: adapter(("head",), 17, 2)})
    slots = jnp.asarray([0, 2, -1, 0], jnp.int32)
    whole = logits(params, config, bank, [0, 2, -1, 0])
    cache = decoder.init_cache(config, 4, 8, "float32")
    lengths, tokens = jnp.asarray([2, 2, 2, 0], jnp.int32), jnp.asarray(TOKENS)
    prefill, append, decode = (
        jax.jit(partial(step, config=config)) for step in (decoder.prefill, decoder.append, decoder.decode)
    )
    cache, first = prefill(params, bank, cache, tokens[:, :2], lengths, slots)
    cache, second = append(params, bank, cache, tokens[:, 2:4], lengths, slots)
    cache, third = decode(params, bank, cache, tokens[:, 4], slots)
    for seen, position in ((first, 1), (second, 3), (third, 4)):
        assert_close(np.asarray(seen[:3]), whole[:3, position], 1e-5)


def test_a_bank_without_these_sites_computes_nothing_for_them() -> None:
    config, params = make(tied=False)
    sites = decoder.layer_sites(config)
    bank = create_bank(sites, 2, 16, None, "float32")
    assert not bank.layer(config.num_layers).modules
    np.testing.assert_array_equal(logits(params, config, bank, [-1] * 4), logits(params, config, None, [-1] * 4))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_base_rows_are_exact_in_sixteen_bits(dtype: str) -> None:
    config, params = make(tied=True)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    bank = create_bank(decoder.adapter_sites(config), 2, 16, None, dtype)
    bank = insert(bank, 1, adapter(MODULES["both"], 4, 1))
    mixed, base = (logits(params, config, held, [1, -1, 1, -1]) for held in (bank, None))
    np.testing.assert_array_equal(mixed[1::2], base[1::2])
    assert (mixed[0] != base[0]).any()
