"""Gradients by the Hopper kernels on a GPU, against autodiff in float32 of the plain definition, on untuned shapes."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support.gradients import TOLERANCE, arguments, assert_gradients, loss, plain
from support.paged import PagedSpec, draw_layer

pytestmark = pytest.mark.gpu("hopper")


SPECS = {
    "Qwen3's widths": PagedSpec(300, 2048, 768, 16, 8, slots=5, empty_slots=1),
    "one expert of all": PagedSpec(200, 192, 320, 1, 1, slots=3),
    "256 experts": PagedSpec(500, 128, 192, 256, 4, slots=4),
    "one token": PagedSpec(1, 256, 128, 64, 4, slots=2, base_rows=0.0),
    "37 tokens": PagedSpec(37, 320, 192, 8, 2, slots=4),
    "all rows on one expert": PagedSpec(700, 256, 192, 8, 2, slots=4, routing="one"),
    "empty experts": PagedSpec(130, 256, 192, 64, 4, slots=4, routing="half"),
    "gpt-oss widths": PagedSpec(90, 2880, 2880, 4, 2, slots=2, ranks=(16, 8)),
    "Mixtral's expert width": PagedSpec(70, 256, 14336, 4, 2, slots=2, ranks=(16,)),
    "a matrix shared by some experts": PagedSpec(300, 256, 192, 8, 2, slots=4, layouts=("shared_some",)),
    "32 slots": PagedSpec(900, 256, 192, 8, 2, slots=32),
    "256 slots": PagedSpec(600, 128, 128, 4, 2, slots=256, ranks=(8, 16)),
    "many rows": PagedSpec(6000, 256, 192, 8, 4, slots=4, ranks=(16, 64)),
    "one slot, many rows": PagedSpec(6000, 256, 192, 8, 4, slots=1, ranks=(16,), base_rows=0.0),
    "base rows alone": PagedSpec(90, 256, 192, 8, 2, slots=4, base_rows=1.0),
    "float16": PagedSpec(300, 512, 320, 16, 4, slots=4, dtype="float16"),
}


@pytest.mark.parametrize("name", SPECS)
def test_gradients_equal_autodiff_of_the_definition(name):
    layer = draw_layer(SPECS[name], np.random.default_rng(0))
    if name == "37 tokens":  # pairs that the plan skips
        layer = replace(layer, chosen=layer.chosen.at[3, 1].set(-1).at[7].set(9))
    x, gates, experts, pools = arguments(layer)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (x, gates, experts, pools))
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax.grad(partial(plain, layer), (0, 1, 3)))(*wide)
    masters = jax.tree.map(lambda pool: pool.astype(jnp.float32), pools)
    for remat in (False, True):
        gradient = jax.jit(jax.grad(partial(loss, layer, "hopper", remat), (0, 1, 3)))
        found = gradient(x, gates, experts, masters)
        assert_gradients(found, expected, TOLERANCE[layer.spec.dtype])
        again = gradient(x, gates, experts, masters)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_portable_layers_have_gradients_through_xla():
    layer = draw_layer(PagedSpec(200, 192, 320, 4, 2, slots=3), np.random.default_rng(2))
    values = arguments(layer)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), values)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax.grad(partial(plain, layer), (0, 1, 3)))(*wide)
    assert_gradients(jax.jit(jax.grad(partial(loss, layer, "portable", False), (0, 1, 3)))(*values), expected, 1e-2)


def test_weights_have_gradients_too():
    layer = draw_layer(PagedSpec(200, 192, 320, 4, 2, slots=3), np.random.default_rng(1))
    values = arguments(layer)
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), values)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax.grad(partial(plain, layer), 2))(*wide)
    assert_gradients(jax.jit(jax.grad(partial(loss, layer, "hopper", False), 2))(*values), expected, 1e-2)
