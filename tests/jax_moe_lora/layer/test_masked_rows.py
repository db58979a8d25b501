"""Contract 11: a masked row reaches nothing, whatever it holds."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.layer.moe import moe_lora
from support.layers import Spec, draw

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize("held", [np.nan, np.inf, 0.0])
def test_contract_11_a_masked_row_reaches_nothing(held):
    problem = draw(Spec(tokens=9))
    mask = jnp.arange(9) % 3 != 1
    x, router = jnp.asarray(problem.x), jnp.asarray(problem.router)
    slots, adapters = jnp.asarray(problem.slots, jnp.int32), problem.bank.layer(0)

    def loss(x, router, experts, pools):
        pages = replace(adapters, pools=pools)
        y = moe_lora(x, router, experts, problem.spec.config, pages, slots, row_mask=mask)
        return (y * jnp.arange(1.0, 10.0)[:, None]).sum(), y

    gradient = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
    others = router, problem.experts, adapters.pools
    wanted, wanted_y = gradient(jnp.where(mask[:, None], x, 1.0), *others)
    given, y = gradient(jnp.where(mask[:, None], x, held), *others)
    np.testing.assert_array_equal(y, wanted_y)
    assert not np.asarray(y)[~np.asarray(mask)].any()
    for one, other in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(one, other)


def test_contract_11_holds_for_scores_that_are_given():
    problem = draw(Spec(tokens=9))
    mask = jnp.arange(9) % 3 != 1
    x, config = jnp.asarray(problem.x), problem.spec.config
    scores = x @ jnp.asarray(problem.router).T

    def loss(x, scores):
        return (moe_lora(x, None, problem.experts, config, scores=scores, row_mask=mask) ** 2).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    wanted = gradient(x, scores)
    hold_nan = [jnp.where(mask[:, None], values, jnp.nan) for values in (x, scores)]
    for one, other in zip(gradient(*hold_nan), wanted, strict=True):
        np.testing.assert_array_equal(one, other)
        assert not np.asarray(one)[~np.asarray(mask)].any()


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid_bias"])
@pytest.mark.parametrize("nth", range(4))
def test_contract_11_holds_whatever_is_differentiated_alone(nth, router):
    """A router's adapter over rows that have no gradient, say: those of a frozen embedding."""
    problem = draw(Spec(tokens=9))
    mask = jnp.arange(9) % 3 != 1
    x, adapters = jnp.where(mask[:, None], jnp.asarray(problem.x), jnp.nan), problem.bank.layer(0)
    config, slots = replace(problem.spec.config, router=router), jnp.asarray(problem.slots, jnp.int32)

    def loss(*arguments):
        router, bias, experts, pools = arguments
        pages = replace(adapters, pools=pools)
        return (moe_lora(x, router, experts, config, pages, slots, router_bias=bias, row_mask=mask) ** 2).sum()

    arguments = jnp.asarray(problem.router), jnp.zeros(problem.spec.experts), problem.experts, adapters.pools
    alone = jax.jit(jax.grad(loss, nth))(*arguments)
    for leaf in jax.tree.leaves(alone):
        assert jnp.isfinite(leaf).all()
    assert any(bool(leaf.any()) for leaf in jax.tree.leaves(alone)) == (nth != 1 or router != "sigmoid_bias")
