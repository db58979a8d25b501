"""The bank: what adapters take, what is refused, and that nothing is lost on the way."""

from dataclasses import replace
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, BankFullError, InputError
from jax_moe_lora.adapters import updates
from jax_moe_lora.adapters.bank import compact, create_bank, remove
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, Site, uniform
from jax_moe_lora.adapters.packing import allocate
from jax_moe_lora.nn import moe_sites
from support.layers import Spec, draw, random_adapter

pytestmark = pytest.mark.optimised

SPEC = Spec(hidden=64, width=48, experts=4, top_k=2)
SITES = moe_sites(SPEC.config)
PAGE_D, PAGE_F = 16 * 64 * 4, 16 * 48 * 4
RNG = np.random.default_rng(0)


def adapter(layout: str = "per_expert", rank: int = 8) -> LoRAAdapter:
    return random_adapter(SPEC, layout, rank, RNG)


def bank(slots: int = 4, max_rank: int = 128, memory: int | None = None):
    return create_bank(SITES, slots, max_rank, memory, "float32")


@pytest.mark.parametrize(
    ("layout", "rank", "pages_d", "pages_f"),
    [
        ("per_expert", 8, 12, 12),  # one page a matrix, however large max_rank is
        ("per_expert", 17, 24, 24),
        ("fused", 16, 8, 12),  # one A for gate and up
        ("shared_outer", 16, 3, 12),  # one page for all experts on three sides
        ("partial", 16, 2, 2),  # half the experts of one module
    ],
)
def test_an_adapter_takes_what_its_matrices_need(layout, rank, pages_d, pages_f):
    needed = adapter(layout, rank)
    loaded = insert(bank(), 1, needed)
    assert bank().nbytes_of(needed) == loaded.slot_nbytes(1)
    assert loaded.slot_nbytes(1) == pages_d * PAGE_D + pages_f * PAGE_F
    assert loaded.slot_nbytes(0) == 0
    assert remove(loaded, 1).slot_nbytes(1) == 0


@pytest.mark.parametrize("layout", ["per_expert", "fused", "shared_outer", "with_router"])
@pytest.mark.parametrize("rank", [16, 32])
def test_whole_pages_take_the_bytes_of_their_elements(layout, rank):
    """No padding at these ranks: each array that the adapter holds, once, in the bank's item size."""
    full = adapter(layout, rank)
    arrays = {id(m): m.size for w in full.weights.values() for m in (w.a, w.b)}
    half = create_bank(SITES, 4, 32, None, "bfloat16")
    assert half.nbytes_of(full) == insert(half, 0, full).slot_nbytes(0) == 2 * sum(arrays.values())


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_pages_hold_the_matrices_however_they_lie_in_memory(monkeypatch, order):
    """Small chunks, free pages full of NaN, and axes of A and B in any order in memory."""
    monkeypatch.setattr(updates, "CHUNK_BYTES", 24 * 64 * 4)
    empty = bank(slots=2, max_rank=32)
    pools = tuple(jnp.where((empty.owner[w] == -1)[:, None, None], jnp.nan, p) for w, p in empty.pages.items())
    ranks = np.array([20, 0, 16, 3], np.int32)
    given = {(0, m): replace(w, ranks=ranks) for m in ("gate", "down") for w in [adapter(rank=20).weights[0, m]]}
    lying = {k: replace(w, a=in_memory(w.a, order), b=in_memory(w.b, order)) for k, w in given.items()}
    held = insert(replace(empty, pools=pools), 1, LoRAAdapter("lying", lying)).layer(0)
    for (_, module), w in given.items():
        entry = held[module]
        for expert, (first_a, first_b, count, rank) in enumerate(np.asarray(entry.table)[1]):
            assert rank == ranks[expert]
            for pool, first, rows in ((entry.a, first_a, w.a[expert]), (entry.b, first_b, w.b[expert].T)):
                found = np.asarray(pool[first : first + count]).reshape(-1, rows.shape[1])
                np.testing.assert_array_equal(found[:rank], rows[:rank])
                assert not found[rank:].any()


def in_memory(values: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """The same array with its axes in this order in memory."""
    return np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))


def test_a_budget_is_kept_and_a_full_bank_refuses_by_name_and_size():
    small = bank(memory=400_000)
    assert sum(pool.nbytes for pool in small.pages.values()) <= 400_000 + sum(p[0].nbytes for p in small.pages.values())
    loaded = insert(small, 0, adapter(rank=32))
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(loaded)]
    needs_and_free = r"Adapter 'per_expert-64' needs \d+ bytes of pages and the bank has \d+ free"
    with pytest.raises(BankFullError, match=needs_and_free):
        insert(loaded, 1, adapter(rank=64))
    for leaf, old in zip(jax.tree.leaves(loaded), before, strict=True):
        np.testing.assert_array_equal(leaf, old)


def test_a_budget_too_small_for_a_page_says_what_is_least():
    with pytest.raises(InputError, match="give adapter_memory at least") as refused:
        bank(memory=100)
    least = int(str(refused.value).split("at least ")[1].split(" ")[0])
    assert bank(memory=least)


def test_insertion_leaves_the_old_bank_as_it_was():
    empty = bank()
    insert(empty, 0, adapter())
    assert empty.slot_nbytes(0) == 0
    assert not any(np.asarray(pool).any() for pool in empty.pages.values())


@pytest.mark.newest
@pytest.mark.slow
def test_fragmented_pages_are_moved_together_when_a_long_run_needs_room():
    problem = draw(replace(SPEC, adapters=(("per_expert", 16),) * 4, slots=4, max_rank=64))
    tight = create_bank(SITES, 4, 64, None, "float32")
    memory = sum(pool.nbytes for pool in tight.pages.values()) * 4 // 16 + 3 * (PAGE_D + PAGE_F)
    tight = create_bank(SITES, 4, 64, memory, "float32")
    for slot in range(4):
        tight = insert(tight, slot, problem.adapters[slot])
    tight = remove(remove(tight, 0), 2)
    late = adapter(rank=32)
    reference_bank = insert(create_bank(SITES, 4, 64, None, "float32"), 0, late)
    for slot in (1, 3):
        reference_bank = insert(reference_bank, slot, problem.adapters[slot])
    filled = insert(tight, 0, late)
    slots = np.where(problem.slots == 2, -1, problem.slots)
    np.testing.assert_array_equal(problem.run(slots, bank=filled), problem.run(slots, bank=reference_bank))
    moved = compact(remove(filled, 1))
    expected = problem.run(np.where(slots == 1, -1, slots), bank=reference_bank)
    np.testing.assert_array_equal(problem.run(np.where(slots == 1, -1, slots), bank=moved), expected)


def test_runs_are_placed_side_by_side_longest_first():
    free = np.array([0, 1, 1, 0, 1, 1, 1, 1, 0, 1], bool)
    first = allocate(free, np.array([1, 4, 2]))
    assert first.tolist() == [9, 4, 1]
    assert allocate(free, np.array([4, 4])) is None
    assert allocate(free, np.zeros(0, int)).size == 0


def weights(a_shape=(4, 8, 64), b_shape=(4, 48, 8), ranks=None, fill=1.0) -> LoRAWeights:
    base = uniform(np.full(a_shape, fill, np.float32), np.ones(b_shape, np.float32), 1.0, 4)
    return base if ranks is None else replace(base, ranks=np.asarray(ranks, np.int32))


@pytest.mark.parametrize(
    ("key", "matrices", "message"),
    [
        ((0, "nose"), weights(), "layer 0, nose: the model has no such projection, or was loaded without room for it"),
        ((3, "gate"), weights(), "layer 3, gate: the model has no gate in this layer"),
        ((0, "gate"), weights(a_shape=(4, 8, 32)), r"A has shape \[4, 8, 32\]; expected \[4 or 1, 8, 64\]"),
        ((0, "gate"), weights(b_shape=(3, 48, 8)), r"B has shape \[3, 48, 8\]"),
        ((0, "gate"), weights(ranks=[8, 8, 9, 8]), "expected 0 to 8"),
        ((0, "gate"), weights((4, 200, 64), (4, 48, 200)), "its rank is 200; the bank takes at most 128"),
        ((0, "gate"), weights(fill=np.nan), "A holds values that are not finite in float32"),
        ((0, "gate"), replace(weights(), scale=np.full(4, np.inf, np.float32)), "scale is not finite"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_by_name(key, matrices, message):
    with pytest.raises(AdapterFormatError, match=f"Adapter 'bad'.*{message}"):
        insert(bank(), 0, LoRAAdapter("bad", {key: matrices}))


def test_values_that_overflow_the_banks_dtype_are_refused():
    half = create_bank(SITES, 1, 16, None, "float16")
    with pytest.raises(AdapterFormatError, match="not finite in float16"):
        insert(half, 0, LoRAAdapter("big", {(0, "gate"): weights(fill=1e6)}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_in_every_dtype(dtype, value):
    bad = weights(fill=3e-8)  # the exponent of zero, or a small one
    bad.b[2, 5, 1] = value
    with pytest.raises(AdapterFormatError, match=f"B holds values that are not finite in {dtype}"):
        insert(create_bank(SITES, 1, 16, None, dtype), 0, LoRAAdapter("bad", {(0, "gate"): bad}))


def test_an_empty_adapter_is_refused():
    with pytest.raises(AdapterFormatError, match="holds no weights"):
        insert(bank(), 0, LoRAAdapter("empty", {}))


@pytest.mark.parametrize("slot", [-1, 4, True])
def test_a_slot_out_of_range_is_refused(slot):
    with pytest.raises(InputError, match="slots 0 to 3"):
        insert(bank(), slot, adapter())
    with pytest.raises(InputError, match="slots 0 to 3"):
        remove(bank(), slot)


def test_a_taken_slot_is_refused():
    with pytest.raises(InputError, match="Slot 2 is taken"):
        insert(insert(bank(), 2, adapter()), 2, adapter())


def test_sites_of_other_layers_share_the_pools():
    sites = {"q": Site(64, 32, 1, (0, 1, 2)), "o": Site(32, 64, 1, (0, 2))}
    pooled = create_bank(sites, 2, 16, None, "float32")
    assert set(pooled.pages) == {32, 64}
    assert set(pooled.layer(1).modules) == {"q"}


@pytest.mark.parametrize(
    ("slots", "max_rank", "name"), [(0, 16, "num_slots"), (2, 0, "max_rank"), (2, True, "max_rank")]
)
def test_sizes_that_are_no_positive_whole_numbers_are_refused(slots, max_rank, name):
    with pytest.raises(InputError, match=f"{name} is .*; expected"):
        bank(slots, max_rank)
