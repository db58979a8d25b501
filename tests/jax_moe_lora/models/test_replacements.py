"""Whole matrices in place of embedding and head, in a bank and in the step."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, BankFullError, InputError, LoRAAdapter
from jax_moe_lora.adapters.bank import AdapterBank, compact, create_bank, remove
from jax_moe_lora.adapters.extraction import extract
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import uniform
from jax_moe_lora.adapters.pool import AdapterPool
from jax_moe_lora.adapters.replacements import matrix_chunks
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import ModelParams, init_params
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.tools.compilations import count_compilations
from support.layers import assert_close
from support.models import decoder_config

pytestmark = pytest.mark.optimised

MOE = MoEConfig(hidden_size=16, expert_width=12, num_experts=3, top_k=2)
SHAPE = V, D = 37, 16
TOKENS = np.random.default_rng(0).integers(0, V, (4, 5)).astype(np.int32)
MODULES = ("embedding", "head")
BYTES = V * D * 4


def make(tied: bool) -> tuple[ModelConfig, ModelParams]:
    config = replace(decoder_config("qwen3_moe", V, D, (2, 1, 8), MOE, (True,)), tie_embeddings=tied)
    params = init_params(config, jax.random.key(0), "float32")
    return config, jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, params)


def adapter(seed: int, *modules: str, lora: str = "q") -> LoRAAdapter:
    """One with LoRA of rank 3 on a module, and these modules replaced."""
    random = np.random.default_rng(seed)
    into, out = {"q": (D, 16), "head": (D, V)}[lora]
    a, b = (random.normal(size=shape).astype(np.float32) for shape in ((1, 3, into), (1, out, 3)))
    matrices = {module: random.normal(size=SHAPE).astype(np.float32) for module in modules}
    layer = 0 if lora == "q" else 1
    return LoRAAdapter(f"of {seed}", {(layer, lora): uniform(a, b, 0.5, 1)}, replacements=matrices)


def bank_of(config: ModelConfig, count: int = 4, dtype: str = "float32", **adapters: LoRAAdapter) -> AdapterBank:
    bank = create_bank(decoder.adapter_sites(config), 3, 16, None, dtype, count, SHAPE)
    for slot, each in adapters.items():
        bank = insert(bank, int(slot.removeprefix("slot")), each)
    return bank


RUN = jax.jit(decoder.logits, static_argnames="config")


def logits(params: ModelParams, config: ModelConfig, bank: Any, slots: list[int]) -> np.ndarray:
    lengths = jnp.full(4, 5, jnp.int32)
    return np.asarray(RUN(params, bank, jnp.asarray(TOKENS), lengths, jnp.asarray(slots, jnp.int32), config=config))


def with_matrices(params: ModelParams, config: ModelConfig, adapter: LoRAAdapter) -> tuple[ModelParams, ModelConfig]:
    """The model whose own matrices are the adapter's, its head and embedding untied."""
    head = params.embedding if params.head is None else params.head
    own = {"embedding": params.embedding, "head": head} | {m: jnp.asarray(x) for m, x in adapter.replacements.items()}
    return replace(params, **own), replace(config, tie_embeddings=False)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_row_has_its_own_matrix_and_the_others_have_theirs(tied: bool) -> None:
    config, params = make(tied)
    adapters = [adapter(1, "embedding"), adapter(2, "head"), adapter(3, *MODULES)]
    bank = bank_of(config, slot0=adapters[0], slot1=adapters[1], slot2=adapters[2])
    mixed = logits(params, config, bank, [0, 1, 2, -1])
    for slot, each in enumerate(adapters):
        lora = bank_of(config, 0, slot0=replace(each, replacements={}))
        expected = logits(*with_matrices(params, config, each), lora, [0] * 4)
        assert_close(mixed[slot], expected[slot], 1e-5)
        solo = logits(params, config, bank, [slot if row == slot else -1 for row in range(4)])
        np.testing.assert_array_equal(mixed[slot], solo[slot])
    base = logits(params, config, None, [-1] * 4)
    np.testing.assert_array_equal(mixed[3], base[3])
    np.testing.assert_array_equal(logits(params, config, bank, [7, -1, 3, -5]), base)  # out of range: base rows


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_base_rows_are_exact_in_sixteen_bits(dtype: str) -> None:
    config, params = make(tied=True)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    bank = bank_of(config, 2, dtype, slot1=adapter(1, *MODULES))
    mixed, base = (logits(params, config, held, [1, -1, 1, -1]) for held in (bank, None))
    np.testing.assert_array_equal(mixed[1::2], base[1::2])
    assert (mixed[0] != base[0]).any()


def test_a_bank_without_room_is_the_bank_of_before() -> None:
    config, _ = make(tied=True)
    sites = decoder.adapter_sites(config)
    bank = create_bank(sites, 3, 16, None, "float32", 0, SHAPE)
    assert bank.replacements is None
    assert len(jax.tree.leaves(bank)) == 2 * len(bank.widths) + 2 * len(sites)


@pytest.mark.slow
def test_a_slot_that_is_reused_never_shows_the_matrix_of_before() -> None:
    config, params = make(tied=False)
    first, second = adapter(1, *MODULES), adapter(2)
    bank = remove(bank_of(config, slot0=first), 0)
    np.testing.assert_array_equal(logits(params, config, bank, [0] * 4), logits(params, config, None, [-1] * 4))
    expected = logits(params, config, bank_of(config, slot0=second), [0] * 4)
    np.testing.assert_array_equal(logits(params, config, insert(bank, 0, second), [0] * 4), expected)
    third = adapter(3, "head")
    reused = insert(bank, 0, third)
    assert set(extract(reused, 0, "x").replacements) == {"head"}
    fresh = logits(params, config, bank_of(config, slot0=third), [0] * 4)
    np.testing.assert_array_equal(logits(params, config, reused, [0] * 4), fresh)


def test_what_is_read_back_is_what_was_inserted() -> None:
    config, _ = make(tied=False)
    one = np.random.default_rng(9).normal(size=SHAPE).astype(np.float32)
    shared = replace(adapter(1), replacements={"embedding": one, "head": one})
    bank = compact(bank_of(config, 2, slot1=shared, slot2=adapter(2, "head")))
    read = extract(bank, 1, "x").replacements
    assert read["embedding"] is read["head"]
    np.testing.assert_array_equal(read["head"], one)
    np.testing.assert_array_equal(extract(bank, 2, "x").replacements["head"], adapter(2, "head").replacements["head"])


def test_bytes_are_counted_and_come_back() -> None:
    config, _ = make(tied=False)
    bank, small = bank_of(config, 2), bank_of(config, 0)
    assert bank.nbytes - small.nbytes == 2 * BYTES + 4 * 2 + 2 * 4 * 3  # owners and two tables
    both, plain = adapter(1, *MODULES), adapter(1)
    assert bank.nbytes_of(both) - bank.nbytes_of(plain) == 2 * BYTES
    held = insert(bank, 0, both)
    assert held.slot_nbytes(0) == bank.nbytes_of(both)
    assert remove(held, 0).slot_nbytes(0) == 0
    insert(remove(held, 0), 1, both)


def test_what_does_not_fit_is_refused_with_its_size_and_leaves_the_bank_as_it_was() -> None:
    config, _ = make(tied=False)
    bank = bank_of(config, 2, slot0=adapter(1, "head"))
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(bank)]
    poisoned = adapter(2, "head")
    poisoned.replacements["head"][36, 3] = np.inf
    wrong = replace(adapter(2), replacements={"head": np.zeros((V + 1, D), np.float32)})
    both = replace(adapter(2, "head", lora="head"))
    of_a_layer = replace(adapter(2), replacements={"q": np.zeros(SHAPE, np.float32)})
    for error, each, message in (
        (BankFullError, adapter(2, *MODULES), r"needs 2 whole matrices of 2\.3 KiB .* and 1 of the bank's 2 are free"),
        (AdapterFormatError, poisoned, "head: it holds values that are not finite in float32"),
        (AdapterFormatError, wrong, r"shape \[38, 16\]; expected \[37, 16\]"),
        (AdapterFormatError, both, "replaced as a whole .* and has LoRA too"),
        (AdapterFormatError, of_a_layer, "expected embedding or head"),
    ):
        with pytest.raises(error, match=message):
            insert(bank, 1, each)
    with pytest.raises(InputError, match="taken"):
        insert(bank, 0, adapter(2))
    for leaf, kept in zip(jax.tree.leaves(bank), before, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), kept)
    with pytest.raises(AdapterFormatError, match=r"takes 2\.3 KiB, and there is no room .* larger max_replacements"):
        insert(bank_of(config, 0), 1, adapter(2, "head"))
    with pytest.raises(AdapterFormatError, match=r"needs 2 whole matrices .* room for 1"):
        insert(bank_of(config, 1), 1, adapter(2, *MODULES))


def test_the_budget_has_room_for_the_matrices_or_says_how_much_they_take() -> None:
    config, _ = make(tied=False)
    sites, pages = decoder.layer_sites(config), 100_000
    bank = create_bank(sites, 3, 16, pages + 2 * BYTES, "float32", 2, SHAPE)
    small = create_bank(sites, 3, 16, pages, "float32")
    assert [pool.shape for pool in bank.pools] == [pool.shape for pool in small.pools]
    with pytest.raises(InputError, match=r"each takes 2\.3 KiB .* adapter_memory more than 4736 bytes"):
        create_bank(sites, 3, 16, 2 * BYTES, "float32", 2, SHAPE)
    for count, shape in ((1, None), (-1, SHAPE), (1, (V, 0))):
        with pytest.raises(InputError, match=r"max_replacements|vocabulary"):
            create_bank(sites, 3, 16, None, "float32", count, shape)


@pytest.mark.slow
def test_loading_and_unloading_compiles_nothing() -> None:
    config, params = make(tied=False)
    bank, adapters = bank_of(config), [adapter(seed, *MODULES[: seed % 3]) for seed in range(3)]
    logits(params, config, bank, [0, 1, 2, -1])
    insert(bank, 0, adapters[2])  # whatever numpy and jax need once
    with count_compilations() as compilations:
        for slot, each in enumerate(adapters):
            bank = insert(bank, slot, each, donate=slot > 0)
        logits(params, config, bank, [0, 1, 2, -1])
        bank = insert(remove(bank, 2), 2, adapters[2], donate=True)
        logits(params, config, bank, [2, 1, 0, -1])
    assert compilations.compilations == 0


def test_a_pool_evicts_for_matrices_and_gives_them_back() -> None:
    config, _ = make(tied=False)
    pool = AdapterPool(bank_of(config, 1), lambda folder, name: adapter(1))
    for name, seed in (("first", 1), ("second", 2)):
        pool.register(name, adapter(seed, "head"))
    for name in ("first", "second", "first"):
        pool.load(name)
        (info,) = pool.loaded()
        assert (info.name, info.nbytes > BYTES) == (name, True)
        (slot,) = pool.slots([name])
        kept = pool.using(lambda bank, slot=slot: extract(bank, slot, "x"))
        np.testing.assert_array_equal(kept.replacements["head"], pool.fetch(name).replacements["head"])
    with pool.hold(["first"]), pytest.raises(BankFullError, match="whole matrices"):
        pool.load("second")
    assert pool.status("second").state == "failed"
    assert pool.using(lambda bank: sum(bank.slot_nbytes(slot) > 0 for slot in range(3))) == 1


def test_a_matrix_is_sent_in_chunks_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_moe_lora.adapters.updates.CHUNK_BYTES", 10 * D * 4)
    matrix = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    sent = list(matrix_chunks(matrix, np.dtype(np.float32)))
    assert [values.shape for _, values in sent] == [(10, D)] * 4
    np.testing.assert_array_equal(np.concatenate([rows for rows, _ in sent]), [*range(V), V, V, V])
    config, _ = make(tied=False)
    each = adapter(4, "head")
    np.testing.assert_array_equal(
        extract(bank_of(config, 1, slot0=each), 0, "x").replacements["head"], each.replacements["head"]
    )
