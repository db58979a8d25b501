"""The layer takes arrays of numpy wherever it takes those of jax, outside of `jit` too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.layer.linear import dense_plan, lora_linear
from jax_moe_lora.layer.moe import moe_lora
from support.layers import Spec, draw

pytestmark = pytest.mark.optimised

PROBLEM = draw(Spec(tokens=6))
ARGUMENTS = {
    "x": PROBLEM.x,
    "router": PROBLEM.router,
    "experts": PROBLEM.experts,
    "adapters": PROBLEM.bank.layer(0),
    "slots": PROBLEM.slots,
}


@pytest.mark.parametrize("of_numpy", [["x"], ["experts", "slots"], ["adapters", "router"], list(ARGUMENTS)], ids=str)
def test_numpy_arrays_give_the_bits_of_jax_arrays(of_numpy):
    expected = moe_lora(**jax.tree.map(jnp.asarray, ARGUMENTS), config=PROBLEM.spec.config)
    given = {
        name: jax.tree.map(np.asarray if name in of_numpy else jnp.asarray, value) for name, value in ARGUMENTS.items()
    }
    np.testing.assert_array_equal(moe_lora(**given, config=PROBLEM.spec.config), expected)


def test_a_dense_projection_takes_numpy_arrays():
    pages, weight = PROBLEM.bank.layer(0).get("router"), np.asarray(PROBLEM.router)
    plan = dense_plan(np.asarray(PROBLEM.slots), PROBLEM.bank.num_slots)
    expected = lora_linear(jnp.asarray(PROBLEM.x), jnp.asarray(weight), None, pages, plan)
    of_numpy = lora_linear(np.asarray(PROBLEM.x), weight, None, jax.tree.map(np.asarray, pages), plan)
    np.testing.assert_array_equal(of_numpy, expected)
