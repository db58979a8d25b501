"""The matmul kernels of every backend in jax's GPU interpreter, with race detection.

One suite for all of them, then what each has alone.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend
from pallas_kernels.errors import InputError
from pallas_kernels.hopper.tuning import HopperConfig
from pallas_kernels.lora_steps.api import make_lora_steps
from pallas_kernels.ops import LayerPages, UnsupportedImplementation, grouped_matmul, make_plan, token_rows
from pallas_kernels.pages import NO_ADAPTERS
from pallas_kernels.portable.tuning import tile_rows
from support.interpreted import HOPPER, PORTABLE, Kernels, by_pair, draw_once, expected, relative_error
from support.paged import PagedSpec, replicated

pytestmark = pytest.mark.usefixtures("interpreter")

KERNELS = {**{f"hopper, {name}": kernels for name, kernels in HOPPER.items()}, "portable": PORTABLE}
GATED, PLAIN = ("gate", "up"), ("down",)


# One matrix runs a part of what two run: it is tried on the shortest and the longest tiles, and by each backend.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "modules"),
    [(name, GATED) for name in KERNELS]
    + [(name, PLAIN) for name in ("hopper, 8 rows", "hopper, 128 rows", "portable")],
)
def test_matmul_shrink_and_expand_equal_the_oracle_without_races(name, modules):
    kernels = KERNELS[name]
    actual = kernels.run(kernels.layer, modules)
    assert relative_error(actual, expected(kernels.layer, modules)) < kernels.tolerance
    base = np.repeat(np.asarray(kernels.layer.slots) < 0, kernels.spec.top_k)
    assert base.any()
    np.testing.assert_array_equal(actual[base], kernels.run(kernels.layer, modules, adapters=NO_ADAPTERS)[base])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "modules"),
    [("hopper, 24 rows", PLAIN), ("hopper, 128 rows", GATED), ("portable", GATED), ("portable", PLAIN)],
)
def test_biases_clamped_swiglu_and_kept_factors_equal_the_reference_without_races(name, modules):
    """gpt-oss's experts, and what training keeps (Hopper's); a bias of the last expert ends where its array does."""
    kernels, gated = KERNELS[name], len(modules) == 2
    layer, spec, plan = kernels.layer, kernels.spec, kernels.plan(kernels.layer)
    weights, pages = tuple(getattr(layer.experts, m) for m in modules), layer.adapters.select(*modules)
    keys = jax.random.split(jax.random.key(3), 3)
    x = 2 * jax.random.normal(keys[0], (spec.tokens, weights[0].shape[2]), spec.dtype)
    biases = tuple(4 * jax.random.normal(key, w.shape[:2], spec.dtype) for key, w in zip(keys[1:], weights))  # noqa: B905
    steps = kernels.steps(plan, pages, layer.slots)
    found = [kernels.matmul(x, weights, plan, pages, "clamped_swiglu", biases, steps=steps)]
    if gated:
        kept = kernels.gated_products(token_rows(x, plan), weights, plan, pages, "clamped_swiglu", biases, steps)
        found += kept[1:]
        if kernels.backend == "hopper":  # one kernel; portable multiplies twice and rounds between
            np.testing.assert_array_equal(by_pair(kept[0], plan), by_pair(found[0], plan))
    call = partial(grouped_matmul, x, plan=plan, of_tokens=True, implementation="reference")
    own = weights if gated else weights[0]
    wanted = [call(own, biases=biases, adapters=pages, activation="clamped_swiglu")]
    if gated:
        each = zip(weights, biases, modules, strict=True)
        wanted += [call(weight, biases=(bias,), adapters=pages.select(module)) for weight, bias, module in each]
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(by_pair(one, plan), by_pair(other, plan)) < kernels.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hopper, 24 rows", "portable"])
def test_a_projection_without_adapters_beside_one_that_has_them(name):
    kernels = KERNELS[name]
    layer = kernels.layer
    own = {key: value for key, value in layer.matrices.items() if key[0] == "up"}
    actual = kernels.run(layer, GATED, adapters=layer.adapters.only({"up"}))
    assert relative_error(actual, expected(replace(layer, matrices=own), GATED)) < kernels.tolerance


@pytest.mark.slow
@pytest.mark.newest
@pytest.mark.parametrize("name", ["hopper, 8 rows", "portable"])
def test_no_rows_at_all_is_no_hang(name):
    """All pairs skipped: no tile, no item, nothing waits."""
    kernels = KERNELS[name]
    layer = kernels.layer
    plan = kernels.plan(replace(layer, chosen=jnp.full_like(layer.chosen, -1)))
    x = jnp.ones((layer.spec.tokens, layer.spec.hidden), layer.spec.dtype)
    kernels.matmul(x, (layer.experts.gate,), plan, NO_ADAPTERS.select("gate"))


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 9])
def test_adapters_anywhere_in_long_tiles(slots):
    """The shrink's windows: wide and narrow, at both ends of a tile and between, and several of one run of rows."""
    spec = PagedSpec(620, 64, 64, 2, 1, slots, (16, 32), ("per_expert",), base_rows=0.05)
    layer, config = draw_once(spec, 1), HopperConfig(184, 2, num_sms=2, apart=True, widths=(48, 96))
    kernels = Kernels("hopper", spec, config)
    actual = kernels.run(layer, GATED)
    assert relative_error(actual, expected(layer, GATED)) < kernels.tolerance
    base = np.asarray(layer.slots) < 0
    np.testing.assert_array_equal(actual[base], kernels.run(layer, GATED, adapters=NO_ADAPTERS)[base])


@pytest.mark.slow
def test_float16_and_tiles_of_64_rows_that_do_not_fill_up():
    """120 pairs of two experts: 64 rows a tile; more steps of K than the ring has stages."""
    kernels = Kernels("portable", PagedSpec(120, 320, 64, 2, 1, ranks=(20,), dtype="float16"))
    assert tile_rows(120, 2) == 64
    layer = draw_once(kernels.spec, 1)
    assert relative_error(kernels.run(layer, GATED), expected(layer, GATED)) < kernels.tolerance


@pytest.mark.slow
def test_mixed_equals_apart_and_shared_equals_replicated():
    """Two batches of half of the slots each: every slot has other neighbours than in the mixed one."""
    layer = PORTABLE.layer
    mixed = PORTABLE.run(layer, GATED)
    for half in range(2):
        own = np.asarray(layer.slots) % 2 == half
        apart = PORTABLE.run(layer, GATED, jnp.where(jnp.asarray(own), layer.slots, -1))
        rows = np.repeat(own, layer.spec.top_k)
        np.testing.assert_array_equal(apart[rows], mixed[rows], f"slots {half} and {half + 2}")
    copies = replicated(layer, 2)  # shared outer
    np.testing.assert_array_equal(PORTABLE.run(copies, GATED), mixed)


@pytest.mark.slow
def test_two_pools_of_a_give_the_bits_of_one():
    """Gate and up whose A pages lie in two arrays: an entry of one reads the page of zeros of the other."""
    layer = PORTABLE.layer
    modules = {module: layer.adapters[module] for module in layer.adapters.modules}
    apart = LayerPages.from_modules(modules | {"up": replace(modules["up"], a=modules["up"].a + 0)})
    np.testing.assert_array_equal(PORTABLE.run(layer, GATED, adapters=apart), PORTABLE.run(layer, GATED))


@pytest.mark.slow
def test_a_whole_layer_equals_the_oracle(monkeypatch):
    """Through `routed_experts`, as if this were a GPU."""
    monkeypatch.setattr(backend, "device_capability", lambda: ((12, 0), "compute capability 12.0"))
    layer = PORTABLE.layer
    actual = np.asarray(layer.function("portable")(layer.slots, layer.adapters).astype(jnp.float32))
    assert relative_error(actual, layer.expected(np.arange(layer.spec.tokens))) < PORTABLE.tolerance


@pytest.mark.parametrize(("planned", "asked"), [("hopper", "xla"), ("hopper", "portable"), ("xla", "portable")])
def test_a_plan_of_another_backend_is_refused(planned, asked):
    """The tile loop would be right on a plan for Hopper, and slow: on an H200 nobody would see why."""
    layer = PORTABLE.layer
    plan = make_plan(layer.chosen, layer.slots, 3, 4, planned)
    x = jnp.ones((layer.spec.tokens, layer.spec.hidden), "bfloat16")
    with pytest.raises(UnsupportedImplementation, match=f"was made for '{planned}', which '{asked}' cannot read; give"):
        grouped_matmul(x, layer.experts.gate, plan, of_tokens=True, implementation=asked)


@pytest.mark.slow
@pytest.mark.newest
def test_steps_of_other_adapters_are_refused():
    kernels = HOPPER["24 rows"]
    layer, spec = kernels.layer, kernels.spec
    plan = make_plan(layer.chosen, layer.slots, spec.experts, spec.slots, "hopper")
    (steps,) = make_lora_steps(plan, (layer.adapters.select("gate", "up"),))
    rows = jnp.ones((plan.order.shape[0], spec.width), spec.dtype)
    down = layer.adapters.select("down")
    with pytest.raises(InputError, match="steps were made for other adapters"):
        Kernels("hopper", spec).matmul(rows, (layer.experts.down,), plan, down, of_tokens=False, steps=steps)
