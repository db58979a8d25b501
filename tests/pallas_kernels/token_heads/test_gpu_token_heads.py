"""The kernel for the heads of a decode step, on a GPU: `JAX_PLATFORMS=cuda pytest -m gpu -k gpu_token_heads`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.token_heads.portable import token_heads
from support.decode_kernels import Heads, assert_heads_by_definition, draw_heads

pytestmark = pytest.mark.gpu("portable")

QWEN3 = Heads(32, 32, 4, 128, 2048, form={})


@pytest.mark.parametrize(
    "heads",
    [
        QWEN3,
        Heads(1, 32, 4, 128, 500, form={}),
        Heads(8, 64, 8, 64, 300, "float16"),
        Heads(5, 16, 8, 256, 129, form={"offset": True}),
        Heads(3, 8, 4, 128, 70, "float16", {"wide": True}),
    ],
    ids=str,
)
def test_heads_are_normed_turned_and_stored(heads):
    assert_heads_by_definition(heads)


def test_a_request_has_the_bits_that_it_has_beside_others():
    rows, norm, angles, place, *caches = draw_heads(QWEN3)
    call = jax.jit(token_heads)
    before = call(rows, norm, angles, place, *caches)
    moved = place.at[7].set(3), *(cache.at[7].set(-cache[7]) for cache in caches)
    after = call(rows.at[7].set(jnp.nan), norm, angles, *moved)
    others = np.arange(QWEN3.batch) != 7
    for result, expected in zip(after, before, strict=True):
        np.testing.assert_array_equal(result[others], expected[others])


def test_caches_that_are_given_away_stay_where_they_are():
    rows, norm, angles, place, *caches = draw_heads(QWEN3)
    where = [cache.unsafe_buffer_pointer() for cache in caches]
    call = jax.jit(token_heads, donate_argnums=(4, 5)).lower(rows, norm, angles, place, *caches).compile()
    for _ in range(3):
        _, *caches = call(rows, norm, angles, place, *caches)
        assert [cache.unsafe_buffer_pointer() for cache in caches] == where
