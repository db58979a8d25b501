"""The backward kernels on Hopper in jax's GPU interpreter, with race detection, on small shapes. No GPU is needed."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch.api import token_rows
from pallas_kernels.grouped_lora import hopper_gradients
from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.hopper.tuning import HopperConfig, deepest
from pallas_kernels.lora_steps.api import Shrunk, make_lora_steps
from pallas_kernels.ops import LayerPages, LoRAPages, RoutingPlan, input_gradient, page_gradients, shrink
from pallas_kernels.pages import NO_ADAPTERS
from support.interpreted import plan_by_xla
from support.lora_steps import steps_by_definition
from support.paged import PagedLayer, PagedSpec, draw_layer

TOLERANCE = 1e-2  # bfloat16
LAYOUTS = ("per_expert", "fused", "shared_some", "shared_outer")
SPEC = PagedSpec(40, 128, 192, 3, 2, slots=4, ranks=(4, 16, 17, 72), layouts=LAYOUTS)
CONFIGS = {
    "24 rows": HopperConfig(24, 2, num_sms=3, apart=True),
    "one warpgroup": HopperConfig(16, 3, 1, num_sms=2, apart=True),
    "128 rows": HopperConfig(128, 3, num_sms=2, apart=True, widths=(64,)),
}
REFERENCE = {op.__name__: jax.jit(partial(op, implementation="reference")) for op in (input_gradient, page_gradients)}


pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.fixture(scope="module")
def layer() -> PagedLayer:
    return draw_layer(SPEC, np.random.default_rng(0))


def planned(layer: PagedLayer, tile_rows: int | None = None) -> RoutingPlan:
    spec = layer.spec
    return plan_by_xla(layer.chosen, layer.slots, spec.experts, spec.slots, "hopper", tile_rows)


def shrunk_by(layer: PagedLayer, plan: RoutingPlan, dy: jax.Array, pages: LayerPages) -> Shrunk:
    """What a projection's transposed adapters make of its rows, by lists from their definition."""
    turned = pages.transposed()
    return shrink(dy, turned, plan, steps_by_definition(plan, turned, layer.slots))


def relative(found: jax.Array, expected: jax.Array) -> float:
    found, expected = (np.asarray(v.astype(jnp.float32), np.float64) for v in (found, expected))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "config"),
    [(("gate", "up"), "24 rows"), (("down",), "one warpgroup"), (("gate", "up"), "128 rows")],
)
def test_rows_gradient_equals_the_reference_without_races(layer, modules, config):
    plan = planned(layer, CONFIGS[config].tile_rows)
    weights = tuple(getattr(layer.experts, module) for module in modules)
    keys = jax.random.split(jax.random.key(1), len(modules))
    dys = tuple(
        token_rows(jax.random.normal(key, (SPEC.tokens, weight.shape[1]), SPEC.dtype), plan)
        for key, weight in zip(keys, weights, strict=True)
    )
    pages, none = layer.adapters.select(*modules), (None,) * len(modules)
    run = partial(hopper.input_gradient, dys, weights, plan, config=CONFIGS[config])
    shrunk = none  # made in the call
    if config != "one warpgroup":
        shrunk = tuple(
            shrunk_by(layer, plan, dy, pages.select(module)) for dy, module in zip(dys, modules, strict=True)
        )
    found = run(adapters=pages, shrunk=shrunk)[plan.position]
    expected = REFERENCE["input_gradient"](dys, weights, plan, adapters=pages)
    assert relative(found, expected[plan.position]) < TOLERANCE
    if config == "24 rows":
        base = np.repeat(np.asarray(layer.slots) < 0, SPEC.top_k)
        alone = run(adapters=NO_ADAPTERS.select(*modules), shrunk=none)[plan.position]
        np.testing.assert_array_equal(np.asarray(found)[base], np.asarray(alone)[base])


@pytest.mark.slow
def test_what_the_forward_pass_shrank_serves_both_projections_backward(layer):
    """One list for gate and up, of which some adapters share their A, gives each one's gradients and rows."""
    plan, modules = planned(layer), ("gate", "up")
    pages, weights = layer.adapters.select(*modules), tuple(getattr(layer.experts, module) for module in modules)
    x, dy = random_rows(plan, pages["gate"], SPEC.tokens)
    dys = dy, dy[:, ::-1]
    of_x = shrink(x, pages, plan, steps_by_definition(plan, pages, layer.slots))
    of_dys = [
        shrink(dy, pages.select(module).transposed(), plan, of_x.steps.transposed(part))
        for part, (dy, module) in enumerate(zip(dys, modules, strict=True))
    ]
    share = jax.random.uniform(jax.random.key(4), plan.order.shape)
    found = page_gradients(x, dys, pages, plan, "hopper", share=share, shrunk=(of_x, of_dys))
    expected = REFERENCE["page_gradients"](x, dys, pages, plan, share=share)
    for one, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative(one, jnp.nan_to_num(want)) < TOLERANCE
    config = replace(deepest(plan.tiles.size), num_sms=3, apart=True, stages=2)
    dx = hopper.input_gradient(dys, weights, plan, adapters=pages, shrunk=tuple(of_dys), config=config)
    rows = REFERENCE["input_gradient"](dys, weights, plan, adapters=pages)
    assert relative(dx[plan.position], rows[plan.position]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("module", ["gate", "down"])
def test_page_gradients_equal_the_reference_without_races(layer, module):
    """Ranks above 64, pages shared by all experts, poisoned pages, base rows and rows between experts."""
    plan, pages = planned(layer), layer.adapters.select(module)
    x, dy = random_rows(plan, pages[module], SPEC.tokens)
    (found,) = hopper_gradients.page_gradients(x, (dy,), pages, plan, num_sms=3)
    (expected,) = REFERENCE["page_gradients"](x, (dy,), pages, plan)
    for own, want in zip(found, expected, strict=True):
        want = jnp.nan_to_num(want)  # the reference multiplies poisoned pages by zero
        assert relative(own, want) < TOLERANCE
        assert not np.asarray(own)[np.asarray(want == 0).all((1, 2))].any(), "a page that no row uses"


@pytest.mark.slow
@pytest.mark.newest
def test_entries_that_no_tile_has_may_hold_anything(layer):
    """The lists' kernel writes a tile's own entries alone; with many slots the rest is whatever was there."""
    plan, pages = planned(layer), layer.adapters.select("gate")
    (steps,) = make_lora_steps(plan, (pages,))
    hidden = jnp.ones((steps.bound, steps.tile_rows, 64), "bfloat16")
    ranks = lambda lists: hopper_gradients.by_rank(Shrunk(lists, hidden), pages.max_rank, plan)  # noqa: E731
    beyond = jnp.arange(steps.entries.shape[2])[None, :] >= 4 * steps.count[:, :1]
    poisoned = replace(steps, entries=jnp.where(beyond[None], jnp.int32(3), steps.entries).at[4].max(
        jnp.where(beyond, 10**6, 0)
    ))  # fmt: skip
    expected = ranks(steps)
    assert np.asarray(expected).any()
    np.testing.assert_array_equal(ranks(poisoned), expected)


def random_rows(plan: RoutingPlan, pages: LoRAPages, tokens: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(2))
    widths = pages.a.shape[2], pages.b.shape[2]
    drawn = [jax.random.normal(key, (tokens, width), "bfloat16") for key, width in zip(keys, widths, strict=True)]
    x, dy = (token_rows(rows, plan) for rows in drawn)
    return x, dy


@pytest.mark.slow
@pytest.mark.newest
def test_rows_between_experts_are_zeros(layer):
    plan = planned(replace(layer, chosen=layer.chosen.at[5].set(-1)))
    x = jnp.ones((SPEC.tokens, 64), "bfloat16").at[5].set(jnp.nan)
    rows = np.asarray(token_rows(x, plan).astype(jnp.float32))
    ends = np.asarray(plan.group_starts + plan.group_sizes)
    starts = np.append(np.asarray(plan.group_starts)[1:], ends[-1] + 64)  # a window of the contraction beyond the last
    gaps = [rows[end:start] for end, start in zip(ends, starts, strict=True)]
    assert sum(map(len, gaps[:-1]))
    assert not np.concatenate(gaps).any()
