"""The kernel that chooses experts, in jax's GPU interpreter, against the definition in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.router.api import kernel_runs
from pallas_kernels.router.portable import route
from support.decode_kernels import Router, assert_routes_by_definition


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("router", "tokens"),
    [
        (Router("softmax_topk", 128, 8), 5),
        (Router("softmax_topk", 32, 3, renormalize=False), 1),
        (Router("topk_softmax", 96, 4, renormalize=False, scaling=1.0), 6),
        (Router("sigmoid_bias", 64, 6), 3),
        (Router("softmax_bias", 64, 2, renormalize_floor=0.5), 3),
    ],
    ids=lambda value: getattr(value, "router", str(value)),
)
def test_the_kernel_chooses_and_weighs_by_definition(router, tokens):
    assert_routes_by_definition(router, tokens)


@pytest.mark.usefixtures("interpreter")
def test_no_expert_is_taken_twice_where_all_others_are_minus_infinity():
    scores = jnp.full((4, 32), -jnp.inf).at[:, 7].set(1.0)
    weights, experts = route(scores, None, False, Router("softmax_topk", 32, 3, renormalize=False, scaling=1.0))
    np.testing.assert_array_equal(experts, [[7, 0, 1]] * 4)
    np.testing.assert_array_equal(weights, [[1.0, 0.0, 0.0]] * 4)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("kind", ["softmax_topk", "topk_softmax", "sigmoid_bias"])
def test_a_token_of_nan_has_weights_of_nan_and_its_neighbours_have_their_own(kind):
    scores = np.random.default_rng().normal(size=(6, 32)).astype(np.float32)
    router, broken = Router(kind, 32, 3), scores.copy()
    broken[1], broken[4, 9] = np.nan, np.nan
    weights, experts = route(jnp.asarray(scores), None, kind == "sigmoid_bias", router)
    found, chosen = route(jnp.asarray(broken), None, kind == "sigmoid_bias", router)
    others = [0, 2, 3, 5]
    np.testing.assert_array_equal(found[np.array(others)], weights[np.array(others)])
    np.testing.assert_array_equal(chosen[np.array(others)], experts[np.array(others)])
    assert np.isnan(found[np.array([1, 4])]).all()
    assert (np.asarray(chosen) < 32).all()


def test_routers_with_groups_or_few_experts_are_for_xla():
    assert kernel_runs(Router("softmax_topk", 128, 8))
    assert not kernel_runs(Router("softmax_topk", 8, 2))
    assert not kernel_runs(Router("sparsemixer", 32, 2))
    assert not kernel_runs(Router("sigmoid_bias", 256, 8, num_groups=8, top_groups=4))
