"""The kernel that plans few tokens and lists their steps, and a layer by its plan, in jax's GPU interpreter."""

from dataclasses import replace

import numpy as np
import pytest

from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.lora_steps.api import forward_plan_and_steps
from pallas_kernels.ops import BASE_SLOT, combine, make_plan
from pallas_kernels.pages import NO_ADAPTERS
from support.interpreted import CONFIGS, TOLERANCE, relative_error
from support.paged import PagedLayer, PagedSpec, draw_layer

pytestmark = pytest.mark.usefixtures("interpreter")

SPECS = {
    "8 tokens": PagedSpec(8, 128, 64, 6, 2, ranks=(4, 40, 16), slots=3),
    "5 tokens on one expert": PagedSpec(5, 64, 64, 4, 3, ranks=(16,), slots=70, routing="one", layouts=("fused",)),
}


def run(layer: PagedLayer, adapters=True) -> np.ndarray:
    """The layer's rows, as the forward pass makes them."""
    spec, slots = layer.spec, layer.slots
    pages = layer.adapters if adapters else NO_ADAPTERS
    plan = make_plan(layer.chosen, slots, spec.experts, spec.slots if adapters else 0, "hopper", 8)
    ins, outs = pages.select("gate", "up"), pages.select("down")
    few, (steps_in, steps_out) = forward_plan_and_steps(plan, (ins, outs))
    assert few.token_tiles is not None
    experts, common = layer.experts, {"config": CONFIGS["8 rows"], "activation": "silu"}
    gated = hopper.grouped_matmul(
        layer.x, (experts.gate, experts.up), few, of_tokens=True, biases=(None, None), adapters=ins, steps=steps_in,
        **common,
    )  # fmt: skip
    down = hopper.grouped_matmul(
        gated, (experts.down,), few, of_tokens=False, biases=(None,), adapters=outs, steps=steps_out, **common
    )
    return np.asarray(combine(down, layer.gates, few))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_a_layer_of_few_tokens_equals_the_oracle_without_races(name):
    spec = SPECS[name]
    layer = draw_layer(spec, np.random.default_rng(0))
    layer = replace(layer, chosen=layer.chosen.at[-1].set(spec.experts))  # a skipped token
    tokens = np.arange(spec.tokens - 1)
    actual = run(layer)
    assert relative_error(actual[:-1], layer.expected(tokens)) < TOLERANCE[spec.dtype]
    assert not actual[-1].any()
    solo = replace(layer, slots=layer.slots.at[1:].set(BASE_SLOT))
    alone = run(solo)
    np.testing.assert_array_equal(actual[0], alone[0])
    np.testing.assert_array_equal(alone[1:], run(layer, adapters=False)[1:])
