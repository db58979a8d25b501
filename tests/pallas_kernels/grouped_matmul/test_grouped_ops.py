"""The grouped ops against float64 loops: every pattern of empty groups, mixed ranks, poison where nobody may read."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import InputError
from pallas_kernels.ops import LayerPages, LoRAPages, grouped_lora, grouped_matmul, make_plan
from pallas_kernels.pages import NO_ADAPTERS
from support.layers import assert_close, rounded
from support.pairs import covering_pairs

TOLERANCE = {"float32": 1e-6, "float16": 1e-6, "bfloat16": 1e-6}  # sums are float32 whatever the inputs are
MATMUL = jax.jit(grouped_matmul, static_argnames=("of_tokens", "activation", "implementation"))
LORA = jax.jit(grouped_lora, static_argnames="implementation")
BACKENDS = ["xla", "reference"]


def routing(groups: list[int], top_k: int = 1, seed: int = 0) -> np.ndarray:
    """Experts `[T, K]` with the given rows an expert, shuffled."""
    experts = np.repeat(np.arange(len(groups)), groups)
    return np.random.default_rng(seed).permutation(experts).reshape(-1, top_k).astype(np.int32)


@covering_pairs(pattern=list(itertools.product([0, 1], repeat=4))[1:], dtype=TOLERANCE, implementation=BACKENDS)
def test_matmul_with_every_pattern_of_empty_groups(pattern, dtype, implementation):
    rng = np.random.default_rng(sum(pattern))
    groups = [0] * 4
    for index in range(30):
        groups[[e for e in range(4) if pattern[e]][index % sum(pattern)]] += 1
    experts = routing(groups)
    x, w = rounded(rng.normal(size=(30, 32)), dtype), rounded(rng.normal(size=(4, 16, 32)), dtype)
    poisoned = np.where(
        np.asarray(pattern)[:, None, None] == 1, w, np.nan
    )  # experts without rows are never read into y
    weights = poisoned if implementation == "xla" else w
    plan = make_plan(jnp.asarray(experts), jnp.full(30, -1), 4, 0)
    y = MATMUL(jnp.asarray(x, dtype), jnp.asarray(weights, dtype), plan, of_tokens=True, implementation=implementation)
    order = np.asarray(plan.order)
    expected = np.stack([w[experts[p, 0]].astype(np.float64) @ x[p] for p in order])
    assert y.dtype == jnp.float32
    assert_close(y, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", BACKENDS)
def test_skipped_rows_give_zeros(implementation):
    rng = np.random.default_rng(0)
    experts = np.asarray([[0, -1], [7, 4], [2, 1]], np.int32)  # of 4: -1, 7 and 4 are skipped
    x, w = rng.normal(size=(3, 32)).astype(np.float32), rng.normal(size=(4, 16, 32)).astype(np.float32)
    plan = make_plan(jnp.asarray(experts), jnp.full(3, -1), 4, 0)
    y = np.asarray(MATMUL(jnp.asarray(x), jnp.asarray(w), plan, of_tokens=True, implementation=implementation))
    by_pair = y[np.asarray(plan.position)].reshape(3, 2, 16)
    assert not by_pair[0, 1].any()
    assert not by_pair[1].any()
    np.testing.assert_allclose(by_pair[2, 0], w[2] @ x[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_biases_and_the_clamped_activation(implementation):
    rng = np.random.default_rng(0)
    x, experts = rng.normal(size=(21, 32)).astype(np.float32), routing([9, 0, 5, 7])
    gate, up = (rng.normal(size=(4, 16, 32)).astype(np.float32) for _ in range(2))
    gate_bias, up_bias = (4 * rng.normal(size=(4, 16)).astype(np.float32) for _ in range(2))
    plan = make_plan(jnp.asarray(experts), jnp.full(21, -1), 4, 0)
    arguments = jnp.asarray(x), (jnp.asarray(gate), jnp.asarray(up)), plan
    y = MATMUL(
        *arguments,
        of_tokens=True,
        biases=(jnp.asarray(gate_bias), jnp.asarray(up_bias)),
        activation="clamped_swiglu",
        implementation=implementation,
    )
    own = experts[:, 0][np.asarray(plan.token)]
    rows = x[np.asarray(plan.token)].astype(np.float64)
    g = np.einsum("pi,poi->po", rows, gate[own]) + gate_bias[own]
    u = np.einsum("pi,poi->po", rows, up[own]) + up_bias[own]
    assert min((g > 7).sum(), (u > 7).sum(), (u < -7).sum()) > 0, "nothing is clamped"
    g, u = np.minimum(g, 7), np.clip(u, -7, 7)
    assert_close(y, (u + 1) * g / (1 + np.exp(-1.702 * g)), 1e-6)


def paged(rng, dtype: str, ranks: np.ndarray, in_width: int, out_width: int):
    """Pages of random matrices for ranks `[S, E]`, everything that nobody owns poisoned; and the matrices."""
    slots, experts = ranks.shape
    bound = 2 + int((-(-ranks // 16)).sum()) * 2
    a, b = np.full((bound, 16, in_width), np.nan), np.full((bound, 16, out_width), np.nan)
    a[0] = b[0] = 0
    table = np.zeros((slots, experts, 4), np.int32)
    matrices, free = {}, 2
    for s, e in np.ndindex(slots, experts):
        rank, count = int(ranks[s, e]), int(-(-ranks[s, e] // 16))
        if rank == 0:
            continue
        own_a = np.zeros((count * 16, in_width))
        own_b = np.zeros((count * 16, out_width))
        own_a[:rank] = rounded(rng.normal(size=(rank, in_width)) * in_width**-0.5, dtype)
        own_b[:rank] = rounded(rng.normal(size=(rank, out_width)) * rank**-0.5, dtype)
        a[free : free + count], b[free : free + count] = own_a.reshape(count, 16, -1), own_b.reshape(count, 16, -1)
        table[s, e] = free, free, count, rank
        matrices[s, e] = own_a, own_b
        free += count + 1  # a poisoned page between any two
    scale = rng.uniform(0.5, 2, (slots, experts)).astype(np.float32)
    pages = LoRAPages(jnp.asarray(a, dtype), jnp.asarray(b, dtype), jnp.asarray(table), jnp.asarray(scale), 128)
    return pages, matrices, scale


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-6), ("bfloat16", 1e-6)])
def test_lora_of_mixed_ranks_reads_its_own_pages_alone(dtype, tolerance, implementation):
    rng = np.random.default_rng(1)
    ranks = rng.choice([0, 4, 8, 16, 17, 64, 128], (5, 4))
    experts = np.stack([rng.permutation(4)[:2] for _ in range(50)]).astype(np.int32)
    slots = rng.integers(-1, 5, 50).astype(np.int32)
    pages, matrices, scale = paged(rng, dtype, ranks, 48, 32)
    x = rounded(rng.normal(size=(50, 48)), dtype)
    y = rng.normal(size=(100, 32)).astype(np.float32)
    plan = make_plan(jnp.asarray(experts), jnp.asarray(slots), 4, 5)
    actual = np.asarray(
        LORA(jnp.asarray(y), jnp.asarray(x, dtype), pages, plan, plan.token, implementation=implementation)
    )
    expected = y.astype(np.float64)
    for row, pair in enumerate(np.asarray(plan.order)):
        s, e = int(slots[pair // 2]), int(experts[pair // 2, pair % 2])
        if (s, e) in matrices:
            a, b = matrices[s, e]
            expected[row] += scale[s, e] * (b.T @ (a @ x[pair // 2]))
    assert_close(actual, expected, tolerance)
    base = slots[np.asarray(plan.token)] == -1
    assert base.any()
    np.testing.assert_array_equal(actual[base], y[base])


def test_adapters_biases_and_weights_must_match():
    plan = make_plan(jnp.zeros((4, 1), jnp.int32), jnp.full(4, -1), 2, 0)
    x, weight = jnp.ones((4, 8)), jnp.ones((2, 6, 8))
    with pytest.raises(InputError, match="Got adapters of 2 modules and 1 biases for weights of shapes"):
        grouped_matmul(x, weight, plan, of_tokens=True, adapters=NO_ADAPTERS.select("gate", "up"))
    with pytest.raises(ValueError, match="Got adapters of 2 modules and 1 biases for weights of shapes"):
        grouped_matmul(x, (weight, weight), plan, of_tokens=True, biases=(jnp.ones((2, 6)),))
    with pytest.raises(InputError, match="expected one for each weight"):
        grouped_matmul(x, (weight, weight), plan, of_tokens=True, adapters=NO_ADAPTERS.select("gate"))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_no_rows_give_no_rows(implementation):
    plan = make_plan(jnp.zeros((0, 2), jnp.int32), jnp.zeros(0, jnp.int32), 4, 3)
    y = grouped_matmul(jnp.ones((0, 8)), jnp.ones((4, 6, 8)), plan, of_tokens=True, implementation=implementation)
    assert y.shape == (0, 6)


def test_adapters_of_another_number_of_slots_than_the_plan_are_refused():
    """A look-up would be clamped to the last slot: another adapter's pages."""
    pages = LoRAPages(jnp.zeros((2, 16, 64)), jnp.zeros((2, 16, 32)), jnp.zeros((3, 4, 4), int), jnp.zeros((3, 4)), 16)
    plan = make_plan(jnp.zeros((5, 1), jnp.int32), jnp.zeros(5, jnp.int32), 4, 2)
    adapters = LayerPages.from_modules({"up": pages})
    with pytest.raises(InputError, match="with a plan of"):
        grouped_matmul(jnp.zeros((5, 64)), jnp.zeros((4, 32, 64)), plan, of_tokens=True, adapters=adapters)
