"""Latent attention with absorbed matrices: each request's adapter of `kv_b` as if it were merged into dense weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.layer.packed_update import MAX_PACKED_RANKS
from jax_moe_lora.models.blocks import absorbed
from jax_moe_lora.models.blocks.absorbed import attend_latents, from_latents, kv_b_adapters, to_latents
from pallas_kernels.ops import BASE_SLOT, LoRAPages
from support.layers import assert_close

pytestmark = pytest.mark.optimised

B, T, H, N, V, C, R, M = 5, 3, 4, 6, 10, 7, 4, 12
RANKS = (20, 3, 0, 16)  # of the slots: two pages, one, no adapter, one that is full
SLOTS = [0, 3, BASE_SLOT, 1, 2]
NOBODY = [BASE_SLOT] * B
RNG = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def paged(matrices: list[tuple[np.ndarray, np.ndarray]], scales: np.ndarray) -> LoRAPages:
    """The pages of A `[rank, C]` and B `[out, rank]` of each slot, in another order than the slots'."""
    pools: tuple[list, list] = ([np.zeros((16, C))], [np.zeros((16, H * (N + V)))])
    table = np.zeros((len(matrices), 1, 4), np.int32)
    for slot in reversed(range(len(matrices))):
        a, b = matrices[slot]
        rank = len(a)
        table[slot, 0] = (len(pools[0]), len(pools[1]), -(-rank // 16), rank) if rank else 0
        for pool, rows in zip(pools, (a, b.T), strict=True):
            filled = np.pad(rows, ((0, -rank % 16), (0, 0)))
            pool += list(filled.reshape(-1, 16, rows.shape[1]))
    a, b = (jnp.asarray(np.stack(pool), jnp.float32) for pool in pools)
    return LoRAPages(a, b, jnp.asarray(table), jnp.asarray(scales[:, None], jnp.float32), max(RANKS))


MATRICES = [(draw(rank, C), draw(H * (N + V), rank)) for rank in RANKS]
SCALES = np.array([0.5, 2.0, 3.0, 0.25], np.float32)
PAGES = paged(MATRICES, SCALES)
WEIGHT = draw(H * (N + V), C)
Q, TURNED, LATENTS, KEYS = draw(B, T, H, N), draw(B, T, H, R), draw(B, M, C), draw(B, M, R)
SEEN = np.arange(M)[None, None] <= np.array([0, 3, 8, 11, 5])[:, None, None] + np.arange(T)[None, :, None]


def run(slots: list[int], pages: LoRAPages | None = None, dtype: str = "float32") -> np.ndarray:
    arrays = (jnp.asarray(array, dtype) for array in (WEIGHT, Q, TURNED, LATENTS, KEYS))
    y = attention(jnp.asarray(slots, jnp.int32), pages, jnp.asarray(SEEN), *arrays)
    assert y.dtype == dtype
    return np.asarray(y.astype(jnp.float32))


@jax.jit
def attention(slots, pages, seen, weight, q, turned, latents, keys):
    weight = weight.reshape(H, N + V, C)
    of_keys, of_values = kv_b_adapters(pages, slots, H, N, q.dtype)
    mixed = attend_latents(to_latents(q, weight[:, :N], of_keys), turned, latents, keys, seen, 0.3)
    return from_latents(mixed, weight[:, N:], of_values)


def expected(slots: list[int]) -> np.ndarray:
    """With keys and values of each head, from weights with each request's adapter merged, in float64."""
    y = np.zeros((B, T, H, V))
    for request, slot in enumerate(slots):
        weight = WEIGHT.astype(np.float64)
        if 0 <= slot < len(MATRICES):
            a, b = MATRICES[slot]
            weight = weight + SCALES[slot] * (b.astype(np.float64) @ a)
        expanded = (LATENTS[request] @ weight.T).reshape(M, H, N + V)
        for token in range(T):
            for head in range(H):
                scores = expanded[:, head, :N] @ Q[request, token, head] + KEYS[request] @ TURNED[request, token, head]
                scores = np.where(SEEN[request, token], 0.3 * scores, -np.inf)
                shares = np.exp(scores - scores.max())
                y[request, token, head] = shares / shares.sum() @ expanded[:, head, N:]
    return y


@pytest.fixture(params=["a block a slot", "a block a request"])
def form(request, monkeypatch):
    """Both forms of the low-rank products: the second one is that of banks with many slots."""
    limit = MAX_PACKED_RANKS if request.param == "a block a slot" else 0
    monkeypatch.setattr(absorbed, "MAX_PACKED_RANKS", limit)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.slow
def test_each_request_has_its_own_adapter_on_both_sides(form):
    y = run(SLOTS, PAGES)
    assert_close(y, expected(SLOTS), 1e-5)
    base = run(SLOTS)
    changed = [np.linalg.norm(y[row] - base[row]) > 0.1 * np.linalg.norm(base[row]) for row in range(B)]
    assert changed == [True, True, False, True, False]


@pytest.mark.slow
def test_base_rows_are_exact_and_mixed_equals_solo(form):
    mixed, base = run(SLOTS, PAGES), run(NOBODY)
    assert (run(NOBODY, PAGES) == base).all()
    assert (mixed[2] == base[2]).all()
    assert (mixed[4] == base[4]).all()  # a slot without an adapter
    for row, slot in enumerate(SLOTS):
        solo = run([slot if other == row else BASE_SLOT for other in range(B)], PAGES)
        assert (solo[row] == mixed[row]).all()


@pytest.mark.slow
def test_a_slot_that_the_bank_does_not_have_is_a_base_row(form):
    base = run(NOBODY)
    for slot in (len(RANKS), -2, 2**31 - 1):
        assert (run([slot] * B, PAGES) == base).all()


@pytest.mark.slow
def test_16_bit_requests_stay_near_the_definition():
    assert_close(run(SLOTS, PAGES, "bfloat16"), expected(SLOTS), 2e-2)
