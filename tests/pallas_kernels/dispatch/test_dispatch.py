"""The kernel that copies token rows to their places, in jax's GPU interpreter; and the way back, through XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import hopper, xla
from pallas_kernels.dispatch.hopper import dispatch

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize(("tokens", "top_k", "width", "num_sms"), [(5, 2, 128, 2), (37, 3, 64, 3), (40, 1, 192, 2)])
def test_dispatch_copies_each_row_to_its_places(tokens, top_k, width, num_sms):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, width)), "bfloat16")
    position = rng.permutation(tokens * top_k + 9)[: tokens * top_k].astype(np.int32)
    rows = dispatch(x, jnp.asarray(position), tokens * top_k + 9, num_sms)
    np.testing.assert_array_equal(np.asarray(rows)[position], np.repeat(np.asarray(x), top_k, 0))


@pytest.mark.parametrize("module", [hopper, xla], ids=["hopper", "xla"])
def test_the_weighted_sum_and_its_gradient_leave_skipped_pairs_out(module):
    """Their rows and weights are NaN, and their positions may lie beyond the rows."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 64)).astype(np.float32)
    position, live = rng.permutation(12).reshape(4, 3), rng.random((4, 3)) < 0.7
    weights = np.where(live, rng.random((4, 3)), np.nan).astype(np.float32)
    rows[position[~live]] = np.nan
    beyond = np.where(live, position, [[3], [12], [40], [99]])
    assert 0 < live.sum() < live.size
    wanted = np.where(live, weights, 0)[..., None] * np.where(live[..., None], rows[position], 0)

    def call(rows, weights):
        return module.weighted_sum(rows, weights, jnp.asarray(beyond), jnp.asarray(live))

    np.testing.assert_allclose(call(jnp.asarray(rows), jnp.asarray(weights)), wanted.sum(1), rtol=1e-6, atol=1e-6)
    drows, dweights = jax.grad(lambda *given: call(*given).sum(), (0, 1))(jnp.asarray(rows), jnp.asarray(weights))
    expected = np.zeros(12)
    expected[position[live]] = weights[live]
    np.testing.assert_allclose(drows, np.repeat(expected[:, None], 64, 1), rtol=1e-6)
    np.testing.assert_allclose(
        dweights, np.where(live, np.where(live[..., None], rows[position], 0).sum(2), 0), 1e-5, 1e-5
    )
