"""Each activation is one function of gate and up, and the reference has it too."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_moe_lora.layer.reference import GATED_UNITS
from pallas_kernels.activations import ACTIVATIONS, gated_unit
from pallas_kernels.constants import Activation
from pallas_kernels.errors import InputError
from support.layers import assert_close
from support.unchecked import annotations_unchecked

# Both sides of every bound, and away from a kink at zero, where a finite difference says nothing.
GATE, UP = (values.reshape(-1, 1) for values in np.meshgrid([-9.0, -3, -0.5, 0.25, 2, 6, 9], [-9.0, -2, 0.5, 8]))


def test_the_names_the_functions_and_the_reference_are_of_the_same_activations():
    assert set(get_args(Activation)) == ACTIVATIONS.keys() == GATED_UNITS.keys()


@pytest.mark.parametrize("name", get_args(Activation))
def test_an_activation_equals_the_reference(name):
    gate, up = jnp.asarray(GATE, jnp.float32), jnp.asarray(UP, jnp.float32)
    assert_close(np.asarray(gated_unit(name, gate, up)), GATED_UNITS[name](GATE, UP), 1e-6)


@pytest.mark.parametrize("name", get_args(Activation))
def test_an_activation_has_a_gradient(name):
    gate, up = jnp.asarray(GATE, jnp.float32), jnp.asarray(UP, jnp.float32)
    check_grads(jax.jit(lambda g, u: gated_unit(name, g, u)), (gate, up), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("name", get_args(Activation))
def test_kernels_can_lower_an_activation(name):
    """Mosaic lowers no custom derivatives: `jnp.maximum(x, 0)` works there, `jax.nn.relu(x)` does not."""
    assert "custom_jvp" in str(jax.make_jaxpr(jax.nn.relu)(GATE)), "jax prints them otherwise now: mend this test"
    written = str(jax.make_jaxpr(lambda gate, up: gated_unit(name, gate, up))(GATE, UP))
    assert "custom_jvp" not in written
    assert "custom_vjp" not in written


def test_an_unknown_activation_is_refused_with_the_choices():
    choices = "activation is 'mystery'; expected one of silu, gelu_tanh, clamped_swiglu"
    with annotations_unchecked(), pytest.raises(InputError, match=choices):
        gated_unit("mystery", jnp.ones((1, 1)), jnp.ones((1, 1)))
