"""Every public op has a gradient under `jit`, or says in a sentence which function has it."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ops
from pallas_kernels.backend import NUM_SMS, target_sms
from support.paged import PagedSpec, draw_layer

WITHOUT_ARRAYS_TO_DIFFERENTIATE = {
    "choose",
    "choose_for",
    "make_plan",
    "make_lora_steps",
    "shrink",
    "quantise",
    "dequantise",
    "pack",
    "unpack",
}
DIFFERENTIABLE = {"combine", "routed_experts"}
LAYER = draw_layer(PagedSpec(7, 64, 64, 3, 2, ranks=(4,), dtype="float32"), np.random.default_rng(0))
PLAN = ops.make_plan(LAYER.chosen, LAYER.slots, 3, 4)
ROWS = jnp.ones((PLAN.order.shape[0], 64))
GATE, UP = LAYER.experts.gate, LAYER.experts.up
CALLS = {
    "combine": lambda rows: ops.combine(rows, LAYER.gates, PLAN),
    "gated_products": lambda rows: ops.gated_products(rows, (GATE, UP), PLAN)[0],
    "grouped_lora": lambda rows: ops.grouped_lora(rows, rows, LAYER.adapters["gate"], PLAN),
    "grouped_matmul": lambda rows: ops.grouped_matmul(rows, GATE, PLAN),
    "input_gradient": lambda rows: ops.input_gradient((rows,), (GATE,), PLAN),
    "page_gradients": lambda rows: ops.page_gradients(rows, (rows,), LAYER.adapters.select("gate"), PLAN)[0][0],
    "routed_experts": lambda rows: ops.routed_experts(rows[:7], LAYER.gates, LAYER.experts, LAYER.adapters, PLAN),
    "token_rows": lambda rows: ops.token_rows(rows[:7], PLAN),
    "weight_gradient": lambda rows: ops.weight_gradient(rows, rows, PLAN),
}


def test_no_op_is_forgotten():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert functions - WITHOUT_ARRAYS_TO_DIFFERENTIATE == CALLS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_an_op_differentiates_or_says_which_function_does(name):
    assert bool(jnp.isfinite(jax.jit(lambda rows: CALLS[name](rows).sum())(ROWS)))
    gradient = jax.jit(jax.grad(lambda rows: CALLS[name](rows).sum()))
    if name in DIFFERENTIABLE:
        assert bool(jnp.isfinite(gradient(ROWS)).all())
        return
    with pytest.raises(ops.NotDifferentiable, match=f"{name} has no gradient of its own: (differentiate|the layer)"):
        gradient(ROWS)


def test_a_named_target_says_how_many_sms_and_retraces():
    seen = []

    @jax.jit
    def traced(x):
        seen.append(target_sms())
        return x

    traced(1.0)
    with ops.lowering_sms(114):
        traced(1.0)
    traced(1.0)
    assert seen == [NUM_SMS, 114]
