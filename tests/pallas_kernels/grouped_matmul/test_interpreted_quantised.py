"""The Hopper matmul over packed weights in jax's GPU interpreter, with race detection.

The interpreter has no operands in registers: the kernel unpacks through memory here, and `quantised/test_packing.py`
has what the registers hold.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import hopper, xla
from pallas_kernels.hopper.quantised_tuning import QuantisedConfig
from pallas_kernels.ops import grouped_matmul
from pallas_kernels.pages import NO_ADAPTERS
from pallas_kernels.quantised.format import FP8_BLOCK, FP8_CHANNEL, MXFP4, int4
from support.interpreted import TOLERANCE, Kernels, by_pair, draw_once, expected, relative_error
from support.packed import packed, wide
from support.paged import PagedSpec

pytestmark = pytest.mark.usefixtures("interpreter")

GATED, PLAIN = ("gate", "up"), ("down",)
SPEC = PagedSpec(14, 128, 192, 3, 2, ranks=(4, 16, 17, 40))
BLOCKS = PagedSpec(14, 128, 128, 3, 2, ranks=(4, 40))  # a block of 128 columns is whole
ONE, TWO = QuantisedConfig(8, 1, 3, 1, 2, True), QuantisedConfig(24, 2, 2, 2, 3, True)
LONG = QuantisedConfig(72, 2, 2, 2, 2, True)  # beyond 64 rows the products of a block come one after the other
CASES = {
    "mxfp4": (SPEC, MXFP4, ONE),
    "int4": (SPEC, int4(64), TWO),
    "int4_zero": (SPEC, int4(32, True), ONE),
    "fp8_channel": (SPEC, FP8_CHANNEL, ONE),
    "fp8_block": (BLOCKS, FP8_BLOCK, TWO),
    "fp8_block, long tiles": (BLOCKS, FP8_BLOCK, LONG),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "modules"), [*((name, GATED) for name in CASES), ("mxfp4", PLAIN), ("fp8_channel", PLAIN)]
)
def test_matmul_and_adapters_equal_the_oracle_without_races(name, modules):
    spec, form, config = CASES[name]
    kernels, layer = Kernels("hopper", spec, config), packed(draw_once(spec), form)
    actual = kernels.run(layer, modules)
    assert relative_error(actual, expected(wide(layer), modules)) < kernels.tolerance
    base = np.repeat(np.asarray(layer.slots) < 0, spec.top_k)
    assert base.any()
    np.testing.assert_array_equal(actual[base], kernels.run(layer, modules, adapters=NO_ADAPTERS)[base])


@pytest.mark.slow
def test_gpt_oss_biases_and_unit_over_mxfp4():
    spec, form, config = CASES["mxfp4"]
    kernels, layer = Kernels("hopper", spec, config), packed(draw_once(spec), form)
    plan, pages = kernels.plan(layer), layer.adapters.select(*GATED)
    x = 2 * jax.random.normal(jax.random.key(3), (spec.tokens, spec.hidden), spec.dtype)
    weights = tuple(getattr(layer.experts, module) for module in GATED)
    biases = tuple(4 * jax.random.normal(jax.random.key(n), (spec.experts, spec.width), spec.dtype) for n in range(2))
    steps = kernels.steps(plan, pages, layer.slots)
    found = kernels.matmul(x, weights, plan, pages, "clamped_swiglu", biases, steps=steps)
    numbers = tuple(getattr(wide(layer).experts, module).astype(jnp.bfloat16) for module in GATED)
    options = {"biases": biases, "adapters": pages, "activation": "clamped_swiglu", "of_tokens": True}
    wanted = grouped_matmul(x, numbers, plan, implementation="reference", **options)
    assert relative_error(by_pair(found, plan), by_pair(wanted, plan)) < kernels.tolerance


def test_what_training_needs_of_packed_weights_goes_through_xla():
    """The products that a backward pass reads, and the gradient of the rows."""
    spec = CASES["mxfp4"][0]
    layer = packed(draw_once(spec), MXFP4)
    plan, pages = Kernels("hopper", spec).plan(layer), layer.adapters.select(*GATED)
    rows = jax.random.normal(jax.random.key(0), (plan.order.shape[0], spec.hidden), spec.dtype)
    dys = tuple(jax.random.normal(jax.random.key(n), (plan.order.shape[0], spec.width), spec.dtype) for n in range(2))

    def both(module, experts):
        weights = tuple(
            getattr(experts, name).astype(spec.dtype) if module is xla else getattr(experts, name) for name in GATED
        )
        options = {"biases": (None, None), "adapters": pages, "steps": None, "activation": "silu"}
        products = module.gated_products(rows, weights, plan, **options)
        dx = module.input_gradient(dys, weights, plan, adapters=pages, shrunk=(None, None))
        return [by_pair(found, plan) for found in (*products, dx)]

    for found, wanted in zip(both(hopper, layer.experts), both(xla, wide(layer).experts), strict=True):
        assert relative_error(found, wanted) < TOLERANCE[spec.dtype]
