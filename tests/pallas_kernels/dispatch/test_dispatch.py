"""The kernel that copies token rows to their places, in jax's GPU interpreter."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch.hopper import dispatch

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.parametrize(("tokens", "top_k", "width", "num_sms"), [(5, 2, 128, 2), (37, 3, 64, 3), (40, 1, 192, 2)])
def test_dispatch_copies_each_row_to_its_places(tokens, top_k, width, num_sms):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(tokens, width)), "bfloat16")
    position = rng.permutation(tokens * top_k + 9)[: tokens * top_k].astype(np.int32)
    rows = dispatch(x, jnp.asarray(position), tokens * top_k + 9, num_sms)
    np.testing.assert_array_equal(np.asarray(rows)[position], np.repeat(np.asarray(x), top_k, 0))
