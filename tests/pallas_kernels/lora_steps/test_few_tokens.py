"""The plan and the steps of few tokens, by their kernel in jax's GPU interpreter, and layers by them."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend
from pallas_kernels.dispatch.api import routed
from pallas_kernels.errors import InputError
from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.hopper.quantised_tuning import QuantisedConfig
from pallas_kernels.lora_steps import hopper_few_tokens
from pallas_kernels.lora_steps.api import forward_plan_and_steps, make_lora_steps
from pallas_kernels.ops import BASE_SLOT, LayerPages, combine
from pallas_kernels.pages import NO_ADAPTERS
from pallas_kernels.quantised.array import Quantised
from support.gradients import arguments, loss
from support.interpreted import CONFIGS, TOLERANCE, plan_by_xla, relative_error
from support.lora_steps import entries_of_few_tokens, random_pages
from support.packed import packed, wide
from support.paged import PagedLayer, PagedSpec, draw_layer

interpreted = pytest.mark.usefixtures("interpreter")


@dataclass(frozen=True)
class Few:
    """What a draw of ids and adapters is made of."""

    tokens: int
    top_k: int
    experts: int
    slots: int
    ranks: tuple[int, ...] = (16,)
    one_pool: bool = True

    def ids(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Experts and slots, some out of range on either side, with repeated experts and runs of one slot."""
        chosen = rng.integers(-1, self.experts + 1, (self.tokens, self.top_k))
        slots = rng.choice([-7, BASE_SLOT, self.slots, 10**9, *range(self.slots)], self.tokens)
        return chosen, np.where(rng.random(self.tokens) < 0.4, np.roll(slots, 1), slots)

    def adapters(self, rng: np.random.Generator) -> LayerPages:
        """Of gate, up and down; half of up's alias gate's A where they share a pool."""
        pool, other = jnp.zeros((1, 16, 64), "bfloat16"), jnp.zeros((1, 16, 64), "bfloat16")
        gate, up, down = (random_pages(rng, self.slots, self.experts, self.ranks, pool) for _ in range(3))
        alias = rng.random((self.slots, self.experts)) < 0.5
        up = replace(up, table=jnp.where(alias[..., None], gate.table.at[..., 1].add(7), up.table))
        up = replace(up, scale=jnp.where(alias, gate.scale, up.scale), a=pool if self.one_pool else other)
        return LayerPages.from_modules({"gate": gate, "up": up, "down": down})


FEW = {
    "1 token": Few(1, 2, 6, 3, (4, 40)),
    "3 tokens on 2 experts": Few(3, 2, 2, 2, (4, 40)),
    "two pools": Few(3, 2, 6, 9, (17,), one_pool=False),
    "70 slots of up to 128 ranks": Few(5, 3, 40, 70, (4, 128)),
    "8 tokens of 8 experts": Few(8, 8, 128, 8, (4, 72)),
}


QUICK = ("1 token", "3 tokens on 2 experts")


@interpreted
@pytest.mark.parametrize(
    ("name", "draws"),
    [(name, 2) for name in QUICK]
    + [pytest.param(name, 4, marks=pytest.mark.slow) for name in FEW if name != "8 tokens of 8 experts"]
    + [pytest.param("8 tokens of 8 experts", 1, marks=pytest.mark.slow(30))],
)
def test_plan_and_steps_equal_their_definition(name, draws):
    case = FEW[name]
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        (chosen, slots), adapters = case.ids(rng), case.adapters(rng)
        plan = plan_by_xla(
            jnp.asarray(chosen, jnp.int32), jnp.asarray(slots, jnp.int32), case.experts, case.slots, "hopper"
        )
        projections = adapters.select("gate", "up"), adapters.select("down")
        few, lists = forward_plan_and_steps(plan, projections)
        assert_plan_has_all_tokens_in_each_tile(few, chosen, case.experts)
        for pages, steps in zip(projections, lists, strict=True):
            of_modules = tuple(pages[module] for module in pages.modules)
            wanted = entries_of_few_tokens(chosen, slots, of_modules, pages.a_in_one_pool)
            assert_steps_equal(steps, list(wanted.values()))


def assert_plan_has_all_tokens_in_each_tile(few, chosen, experts):
    hit = sorted(set(chosen.reshape(-1)) & set(range(experts)))
    count, tokens = len(hit), chosen.shape[0]
    assert int(few.tiles.count[0]) == int(few.token_tiles.count[0]) == count
    np.testing.assert_array_equal(few.tiles.expert[:count], hit)
    np.testing.assert_array_equal(few.tiles.start[:count], 8 * np.arange(count))
    np.testing.assert_array_equal(few.tiles.rows[:count], tokens)
    np.testing.assert_array_equal(few.token_tiles.start[:count], 0)
    valid = np.isin(chosen, hit)
    np.testing.assert_array_equal(np.asarray(routed(few)).reshape(chosen.shape), valid)
    rows = 8 * np.searchsorted(hit, chosen) + np.arange(tokens)[:, None]
    np.testing.assert_array_equal(np.asarray(few.position).reshape(chosen.shape)[valid], rows[valid])
    assert few.order.shape[0] == 8 * min(chosen.size, experts)


def assert_steps_equal(steps, wanted: list[list[tuple]]):
    free = 0
    for tile, entries in enumerate(wanted):
        count, first = int(steps.count[tile, 0]), int(steps.first[tile, 0])
        assert 4 * count == len(entries)
        assert count <= steps.max_steps
        found = np.asarray(steps.entries)[:, tile, : 4 * count].T
        np.testing.assert_array_equal(found, np.reshape(entries, (-1, 6)))
        assert first >= free, "two tiles share an H"
        free = first + count
    assert free <= steps.bound


LAYERS = {
    "1 token": PagedSpec(1, 128, 64, 4, 2, ranks=(40,), slots=1, base_rows=0.0),
    "8 tokens": PagedSpec(8, 128, 64, 6, 2, ranks=(4, 40, 16), slots=3),
    "5 tokens on one expert": PagedSpec(5, 64, 64, 4, 3, ranks=(16,), slots=70, routing="one", layouts=("fused",)),
    "8 tokens of 8 experts": PagedSpec(8, 64, 64, 9, 8, ranks=(16,), slots=8, dtype="float16"),
}


def run(layer: PagedLayer, slots=None, adapters=True, in_order=False) -> np.ndarray:
    """The layer's rows, as the forward pass makes them; `in_order`: by the sorted plan."""
    spec, slots = layer.spec, layer.slots if slots is None else slots
    pages = layer.adapters if adapters else NO_ADAPTERS
    plan = plan_by_xla(layer.chosen, slots, spec.experts, spec.slots if adapters else 0, "hopper", 8)
    ins, outs = pages.select("gate", "up"), pages.select("down")
    if in_order:
        steps_in, steps_out = make_lora_steps(plan, (ins, outs))
    else:
        plan, (steps_in, steps_out) = forward_plan_and_steps(plan, (ins, outs))
    assert (plan.token_tiles is None) == in_order
    experts, common = layer.experts, {"config": CONFIGS["8 rows"], "activation": "silu"}
    if isinstance(experts.gate, Quantised):
        common["config"] = QuantisedConfig(8, 1, 3, 1, num_sms=2, interpreted=True)
    gated = hopper.grouped_matmul(
        layer.x, (experts.gate, experts.up), plan, of_tokens=True, biases=(None, None), adapters=ins, steps=steps_in,
        **common,
    )  # fmt: skip
    down = hopper.grouped_matmul(
        gated, (experts.down,), plan, of_tokens=False, biases=(None,), adapters=outs, steps=steps_out, **common
    )
    return np.asarray(combine(down, layer.gates, plan))


@interpreted
@pytest.mark.slow(30)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_the_oracle_without_races(name):
    spec = LAYERS[name]
    layer = draw_layer(spec, np.random.default_rng(0))
    tokens = np.arange(spec.tokens)
    if spec.tokens > 1:  # the last one is skipped
        layer, tokens = replace(layer, chosen=layer.chosen.at[-1].set(spec.experts)), tokens[:-1]
    mixed = run(layer)
    assert relative_error(mixed[tokens], layer.expected(tokens)) < TOLERANCE[spec.dtype]
    assert not np.delete(mixed, tokens, 0).any()
    base = np.asarray(layer.slots) < 0
    nobody = run(layer, adapters=False)
    np.testing.assert_array_equal(mixed[base], nobody[base])
    own = np.asarray(layer.slots) == int(layer.slots[0])
    solo = run(layer, jnp.where(jnp.asarray(own), layer.slots, BASE_SLOT))
    np.testing.assert_array_equal(solo[own], mixed[own])
    np.testing.assert_array_equal(solo[~own], nobody[~own])


@interpreted
@pytest.mark.slow(30)
@pytest.mark.parametrize("form", [None, "mxfp4", "fp8_channel"])
def test_a_layer_has_the_bits_of_the_sorted_plan(form):
    layer = draw_layer(LAYERS["8 tokens" if form is None else "5 tokens on one expert"], np.random.default_rng(1))
    layer = layer if form is None else packed(layer, form)
    found = run(layer)
    np.testing.assert_array_equal(found, run(layer, in_order=True))
    tokens = np.arange(layer.spec.tokens)
    assert relative_error(found, wide(layer).expected(tokens)) < TOLERANCE[layer.spec.dtype]


@pytest.fixture
def hopper_here(monkeypatch):
    """For what is traced and not run."""
    monkeypatch.setattr(backend, "device_capability", lambda: ((9, 0), "compute capability 9.0"))


SIZES = {
    "fewer tokens than slots, and their entries in fewer chunks": PagedSpec(4, 64, 64, 16, 2, slots=8, ranks=(128,)),
    "no fewer pairs than experts times slots": PagedSpec(4, 64, 64, 4, 2, slots=2),
    "most pairs, and more slots": PagedSpec(8, 64, 64, 9, 8, slots=70),
    "one of all": PagedSpec(1, 64, 64, 1, 1, slots=1),
}


@pytest.mark.parametrize("name", SIZES)
def test_steps_fit_the_adapters_whatever_their_number(name, hopper_here, monkeypatch):
    layer = draw_layer(SIZES[name], np.random.default_rng(0))
    calls, own = [], hopper_few_tokens.plan_and_steps
    monkeypatch.setattr(hopper_few_tokens, "plan_and_steps", lambda *given: calls.append(given) or own(*given))
    y = jax.eval_shape(layer.function("hopper"), layer.slots, layer.adapters)
    assert y.shape == layer.x.shape
    assert len(calls) == 1


def test_gradients_take_the_sorted_plan(hopper_here, monkeypatch):
    monkeypatch.setattr(hopper_few_tokens, "plan_and_steps", lambda *given: pytest.fail("it was planned anew"))
    layer = draw_layer(PagedSpec(4, 64, 64, 4, 2), np.random.default_rng(0))
    jax.eval_shape(jax.grad(partial(loss, layer, "hopper", False), (0, 1, 2, 3)), *arguments(layer))


def test_a_plan_of_few_tokens_is_refused_where_it_would_be_misread():
    layer = draw_layer(PagedSpec(4, 64, 64, 4, 2), np.random.default_rng(0))

    def call(use):
        plan = plan_by_xla(layer.chosen, layer.slots, 4, 4, "hopper")
        use(forward_plan_and_steps(plan, (layer.adapters.select("down"),))[0])

    def multiply(experts, config, plan):
        hopper.grouped_matmul(
            layer.x, (experts.gate,), plan, of_tokens=True, biases=(None,), adapters=NO_ADAPTERS.select("gate"),
            steps=None, activation="silu", config=config,
        )  # fmt: skip

    uses = {
        "came with its steps": lambda plan: make_lora_steps(plan, (layer.adapters.select("down"),)),
        "in 8 rows; got a config of 24": partial(multiply, layer.experts, CONFIGS["24 rows"]),
    }
    for sentence, use in uses.items():
        with pytest.raises(InputError, match=sentence):
            jax.eval_shape(partial(call, use))
