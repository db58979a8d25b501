"""Gradients of the layer, by hand around each backend, against autodiff of a plain dense definition in float32."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer.linear import dense_plan, lora_linear
from jax_moe_lora.layer.moe import moe_lora, routed_experts
from pallas_kernels.ops import make_plan, page_gradients
from support.gradients import (
    TOLERANCE,
    arguments,
    assert_gradients,
    cotangent,
    layer_gradients,
    loss,
    plain_gradients,
    routing,
    with_pools,
)
from support.paged import PagedLayer, PagedSpec, draw_layer

RANKS = (4, 16, 17, 40)
SIZES = PagedSpec(23, 64, 96, 5, 3, slots=5, ranks=RANKS, dtype="float32")
PAGES = 128  # of each pool: layers of these sizes run one program, whatever their layouts
SPECS = {
    "mixed": replace(SIZES, empty_slots=1),
    "per-expert": PagedSpec(20, 32, 48, 4, 2, layouts=("per_expert",), dtype="float32"),
    "shared-some": replace(SIZES, layouts=("shared_some",), empty_slots=1),
    "one token": PagedSpec(1, 32, 48, 4, 2, dtype="float32", base_rows=0.0),
    "base rows alone": replace(SIZES, base_rows=1.0, empty_slots=1),
    "one expert": replace(SIZES, routing="one", empty_slots=1),
    "bfloat16": replace(SIZES, dtype="bfloat16", empty_slots=1),
    "float16": replace(SIZES, dtype="float16", empty_slots=1),
}


# `mixed` has slots of every layout but `shared-some`; alone, a layout runs the same program on other tables.
CASES = [(name, "xla") for name in SPECS if name != "per-expert"] + [("mixed", "reference")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_gradients_equal_autodiff_of_the_definition(name, implementation):
    layer = with_more_pages(draw_layer(SPECS[name], np.random.default_rng(0)))
    if name == "mixed":  # pairs that the plan skips
        layer = replace(layer, chosen=layer.chosen.at[3, 1].set(-1).at[7].set(9))
    sizes = SIZES if layer.spec.tokens == SIZES.tokens else layer.spec
    wide = jax.tree.map(lambda v: v.astype(jnp.float32), (routing(layer)[2].pools, arguments(layer)))
    in_float32 = layer.chosen, layer.slots, replace(layer.adapters, pools=wide[0])
    with jax.default_matmul_precision("highest"):
        expected = plain_gradients(sizes, in_float32, wide[1])
    for remat in (False, True) if name == "mixed" else (False,):
        found = layer_gradients(sizes, implementation, remat, routing(layer), arguments(layer))
        assert_gradients(found, expected, TOLERANCE[layer.spec.dtype])


def with_more_pages(layer: PagedLayer) -> PagedLayer:
    """The same layer, with pages that nobody owns at the end of its pools."""
    pools = layer.adapters.pools
    assert all(pool.shape[0] <= PAGES for pool in pools.values()), {n: pool.shape[0] for n, pool in pools.items()}
    return replace(
        layer,
        adapters=replace(
            layer.adapters,
            pools={
                name: jnp.pad(pool, ((0, PAGES - pool.shape[0]), (0, 0), (0, 0)), constant_values=jnp.nan)
                for name, pool in pools.items()
            },
        ),
    )


def test_what_nobody_asks_for_is_not_computed():
    layer = draw_layer(SPECS["per-expert"], np.random.default_rng(0))
    of_pools = jax.make_jaxpr(jax.grad(partial(loss, layer, "xla", False), 3))(*arguments(layer))
    of_all = jax.make_jaxpr(jax.grad(partial(loss, layer, "xla", False), (0, 1, 2, 3)))(*arguments(layer))
    # The gradients of three weights and of x through two projections, each a loop over tiles.
    loops = lambda jaxpr: str(jaxpr).count("while[")  # noqa: E731
    assert loops(of_pools) <= loops(of_all) - 5


@pytest.mark.slow
def test_a_loss_on_the_router_alone_gives_the_layer_no_gradient():
    layer = draw_layer(SPECS["per-expert"], np.random.default_rng(0))
    x, gates, experts, pools = arguments(layer)

    def of_router(gates, pools):
        y = routed_experts(x, gates, layer.chosen, experts, layer.config, with_pools(layer, pools), layer.slots, "xla")
        return gates.sum() + jax.lax.stop_gradient(y).sum()

    dgates, dpools = jax.jit(jax.grad(of_router, (0, 1)))(gates, pools)
    assert (np.asarray(dgates) == 1).all()
    assert not any(np.asarray(pool).any() for pool in jax.tree.leaves(dpools))


@pytest.mark.slow
@pytest.mark.optimised
def test_float32_pages_beside_16_bit_rows_are_rounded_and_get_float32_gradients():
    layer = draw_layer(SPECS["bfloat16"], np.random.default_rng(0))
    x, gates, experts, pools = arguments(layer)
    masters = jax.tree.map(lambda pool: pool.astype(jnp.float32) * (1 + 1e-4), pools)
    rounded = jax.tree.map(lambda pool: pool.astype(jnp.bfloat16), masters)
    gradient = jax.jit(jax.value_and_grad(partial(loss, layer, "xla", False), 3))
    (y, of_masters), (same, of_rounded) = (gradient(x, gates, experts, p) for p in (masters, rounded))
    assert y == same
    for wide, narrow in zip(of_masters.values(), of_rounded.values(), strict=True):
        assert wide.dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(wide.astype(jnp.bfloat16)), np.asarray(narrow))
        assert (np.asarray(wide) != np.asarray(narrow.astype(jnp.float32))).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-oss", pytest.param("router", marks=pytest.mark.slow)])
def test_check_grads(name):
    """Against finite differences: biases and the clamped unit, and the whole layer through its router."""
    rng = np.random.default_rng(1)
    layer = draw_layer(PagedSpec(6, 16, 16, 3, 2, slots=2, ranks=(4, 20), dtype="float32"), rng)
    x, gates, experts, pools = arguments(layer)
    live = jax.tree.map(lambda pool: jnp.nan_to_num(pool), pools)
    if name == "gpt-oss":
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
        experts = replace(experts, gate_bias=draw(3, 16), up_bias=draw(3, 16), down_bias=draw(3, 16))
        config = replace(layer.config, activation="clamped_swiglu")

        @jax.jit
        def layer_of(x, gates, experts, pools):
            adapters = with_pools(layer, pools)
            return routed_experts(x, gates, layer.chosen, experts, config, adapters, layer.slots, "xla")

        check_grads(layer_of, (x, gates, experts, live), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)
        return
    config = MoEConfig(16, 16, 3, 2, renormalize=True)
    router = jnp.asarray(3 * rng.normal(size=(3, 16)), jnp.float32)  # apart: no step crosses a choice of expert

    @jax.jit
    def through_router(x, router, pools):
        return moe_lora(x, router, experts, config, with_pools(layer, pools), layer.slots, implementation="xla")

    check_grads(through_router, (x, router, live), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_dense_projection(dtype):
    """Attention's and the router's form: the tile loop, with base rows and poisoned pages."""
    spec = PagedSpec(29, 32, 48, 1, 1, slots=4, ranks=RANKS, layouts=("per_expert",), dtype=dtype)
    layer = draw_layer(spec, np.random.default_rng(2))
    pages, weight = layer.adapters["gate"], layer.experts.gate[0]
    plan = dense_plan(layer.slots, 4)

    def projected(x, weight, a, b):
        return (lora_linear(x, weight, None, replace(pages, a=a, b=b), plan) * cotangent((29, 48))).sum()

    def defined(x, weight, a, b):
        table, own = pages.table[layer.slots, 0], layer.slots >= 0
        y = x @ weight.T
        for page in range(3):
            live = (own & (page < table[:, 2]))[:, None, None]
            index = jnp.where(live[:, 0], table[:, :2] + page, 0)
            left, right = jnp.where(live, a[index[:, 0]], 0), jnp.where(live, b[index[:, 1]], 0)
            scale = pages.scale[layer.slots, 0][:, None]
            y = y + scale * jnp.einsum("tro,tr->to", right, jnp.einsum("tri,ti->tr", left, x))
        return (y * cotangent((29, 48))).sum()

    values = (layer.x, weight, pages.a, pages.b)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(jax.grad(defined, (0, 1, 2, 3)))(*(v.astype(jnp.float32) for v in values))
    assert_gradients(jax.jit(jax.grad(projected, (0, 1, 2, 3)))(*values), expected, TOLERANCE[dtype])


@partial(jax.jit, static_argnums=0)
def both_page_gradients(implementation: str, x, dy, adapters, plan, share):
    """With shares of the rows, and without."""
    return [page_gradients(x, (dy,), adapters, plan, implementation, share=own) for own in (None, share)]


@pytest.mark.slow
@pytest.mark.parametrize("module", ["gate", "down"])  # up has the sizes of gate
def test_page_gradients_equal_the_definition(module):
    layer = draw_layer(SPECS["mixed"], np.random.default_rng(3))
    plan = make_plan(layer.chosen, layer.slots, layer.spec.experts, layer.spec.slots)
    pages, adapters = layer.adapters[module], layer.adapters.select(module)
    rng = np.random.default_rng(4)
    x, dy = (
        jnp.asarray(np.where(np.asarray(plan.order < plan.position.shape[0])[:, None], rng.normal(size=size), np.nan))
        .astype(jnp.float32)
        for size in ((plan.order.shape[0], pages.a.shape[2]), (plan.order.shape[0], pages.b.shape[2]))
    )  # fmt: skip
    share = jnp.asarray(rng.uniform(size=plan.order.shape), jnp.float32)
    found, expected = (both_page_gradients(name, x, dy, adapters, plan, share) for name in ("xla", "reference"))
    assert_gradients(found, expected, 1e-5)
