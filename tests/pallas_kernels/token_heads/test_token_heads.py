"""The kernel for the heads of a decode step, in jax's GPU interpreter, against the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.token_heads import api, xla
from pallas_kernels.token_heads.api import kernel_runs
from pallas_kernels.token_heads.norm import HeadNorm
from support.decode_kernels import Heads, assert_heads_by_definition

pytestmark = pytest.mark.usefixtures("interpreter")
PLACES = 6


@pytest.mark.parametrize(
    "heads",
    [
        Heads(3, 8, 4, 128, PLACES, form={}),
        Heads(2, 4, 4, 64, PLACES, "float16", {"offset": True}),
        Heads(1, 4, 4, 64, PLACES, form={"wide": True}),
        Heads(2, 4, 4, 64, PLACES),
    ],
    ids=str,
)
def test_heads_are_normed_turned_and_stored(heads):
    assert_heads_by_definition(heads)


def test_the_gradient_is_that_of_the_definition():
    rng = np.random.default_rng()

    def draw(*shape: int, dtype: str = "float32"):
        return jnp.asarray(rng.normal(size=shape), dtype)

    caches = [draw(2, PLACES, 4, 64, dtype="bfloat16") for _ in range(2)]
    place, angles = jnp.asarray([3, PLACES], jnp.int32), (draw(2, 32), draw(2, 32))
    cotangents = [draw(2, 4, 64), *(draw(*cache.shape) for cache in caches)]

    def loss(call, rows, q, k, *caches):
        results = call(rows, HeadNorm(q, k, 1e-6), angles, place, *caches)
        return sum((y.astype(jnp.float32) * dy).sum() for y, dy in zip(results, cotangents, strict=True))

    operands = draw(2, 12 * 64), draw(64, dtype="bfloat16"), draw(64, dtype="bfloat16"), *caches
    of_all = tuple(range(1, 1 + len(operands)))
    found = jax.grad(loss, of_all)(lambda *rest: api.token_heads(*rest, "hopper"), *operands)
    for result, wanted in zip(found, jax.grad(loss, of_all)(xla.token_heads, *operands), strict=True):
        np.testing.assert_array_equal(result, wanted)


def test_sizes_that_do_not_fill_a_block_are_for_xla():
    assert kernel_runs(32, 4, 128)
    assert not kernel_runs(32, 2, 128)
    assert not kernel_runs(6, 4, 128)
    assert not kernel_runs(8, 4, 96)
