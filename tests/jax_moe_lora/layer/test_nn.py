"""The Flax modules hold parameters and give the bits of the pure functions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.nnx import bridge

from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import LoRAAdapter, Site, uniform
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer.linear import dense_plan, lora_linear
from jax_moe_lora.layer.moe import moe_lora
from jax_moe_lora.nn import LoRALinear, MoELoRA, RoutedExperts, Router, linen_variables, load, moe_sites

pytestmark = pytest.mark.optimised

CONFIG = MoEConfig(hidden_size=64, expert_width=32, num_experts=8, top_k=2, renormalize=True)
SLOTS = jnp.array([1, -1, 0, 1, -1, 2])


def adapter(sites: dict[str, Site], rank: int, seed: int = 0) -> LoRAAdapter:
    rng = np.random.default_rng(seed)
    weights = {}
    for module, site in sites.items():
        a = rng.normal(size=(site.num_experts, rank, site.in_width)).astype(np.float32)
        b = rng.normal(size=(site.num_experts, site.out_width, rank)).astype(np.float32)
        weights[0, module] = uniform(a, b, 0.5, site.num_experts)
    return LoRAAdapter("test", weights)


@pytest.fixture
def layer() -> MoELoRA:
    layer = MoELoRA(CONFIG, max_adapters=4, max_rank=32, rngs=nnx.Rngs(0))
    load(
        layer, lambda bank: insert(insert(bank, 0, adapter(moe_sites(CONFIG), 4)), 1, adapter(moe_sites(CONFIG), 20, 1))
    )
    return layer


@pytest.fixture
def rows() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (6, 64))


@jax.jit
def pure(router, experts, bank, x, slots):
    return moe_lora(x, router, experts, CONFIG, bank.layer(0), slots)


def test_module_equals_the_pure_function(layer, rows):
    expected = pure(layer.router.weight[...], layer.experts.weights, layer.adapters.bank, rows, SLOTS)
    np.testing.assert_array_equal(nnx.jit(lambda m, x, s: m(x, s))(layer, rows, SLOTS), expected)


def test_experts_with_biases_hold_them_as_parameters(rows):
    config = replace(CONFIG, activation="clamped_swiglu", expert_bias=True)
    layer = MoELoRA(config, rngs=nnx.Rngs(0))
    base = nnx.jit(lambda m, x: m(x))(layer, rows)
    layer.experts.down_bias.set_value(jnp.ones((8, 64)))
    moved = nnx.jit(lambda m, x: m(x))(layer, rows)
    np.testing.assert_allclose(moved, base + 1, rtol=1e-5, atol=1e-5)  # the weights of a row's experts sum to one
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(layer.experts))} >= {"gate_bias", "up_bias", "down_bias"}


@pytest.mark.slow
@pytest.mark.newest
def test_adapters_split_from_base_weights(layer, rows):
    graph, params, adapters = nnx.split(layer, nnx.Param, ...)
    assert {path[0] for path, _ in nnx.to_flat_state(adapters)} == {"adapters"}
    assert {path[0] for path, _ in nnx.to_flat_state(params)} == {"router", "experts"}

    @jax.jit
    def forward(params, adapters, x, slots):
        return nnx.merge(graph, params, adapters)(x, slots)

    expected = pure(layer.router.weight[...], layer.experts.weights, layer.adapters.bank, rows, SLOTS)
    np.testing.assert_array_equal(forward(params, adapters, rows, SLOTS), expected)


@pytest.mark.newest
@pytest.mark.slow
def test_loading_into_a_module_does_not_retrace(layer, rows):
    traces = []

    @nnx.jit
    def forward(module, x, slots):
        traces.append(1)
        return module(x, slots)

    before = forward(layer, rows, SLOTS)
    load(layer, lambda bank: insert(bank, 2, adapter(moe_sites(CONFIG), 9, 2)))
    after = forward(layer, rows, SLOTS)
    assert len(traces) == 1
    np.testing.assert_array_equal(before[:5], after[:5])
    assert (before[5] != after[5]).any()


@pytest.mark.slow
def test_linen_through_the_bridge_gives_the_same(layer, rows):
    linen = bridge.to_linen(MoELoRA, CONFIG, max_adapters=4, max_rank=32)
    variables = linen.init(jax.random.key(0), rows, SLOTS)
    assert set(variables) == {"params", "LoRAParam", "LoRATable"}
    params = {
        "router": {"weight": layer.router.weight[...]},
        "experts": {name: getattr(layer.experts, name)[...] for name in ("gate", "up", "down")},
    }
    loaded = {"params": params} | linen_variables(layer.adapters.bank)
    assert jax.tree.structure(loaded["LoRAParam"]) == jax.tree.structure(dict(variables["LoRAParam"]))
    expected = pure(layer.router.weight[...], layer.experts.weights, layer.adapters.bank, rows, SLOTS)
    np.testing.assert_array_equal(jax.jit(linen.apply)(loaded, rows, SLOTS), expected)


@pytest.mark.parametrize("given", ["slots", "request_lengths", "request_slots"])
def test_a_module_without_a_bank_refuses_slots(rows, given):
    layer = MoELoRA(CONFIG, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=f"{given} came to a module without an adapter bank; make it with max_adapt"):
        layer(rows, **{given: SLOTS})
    if given == "slots":
        with pytest.raises(InputError, match="slots came to a module without an adapter bank"):
            LoRALinear(64, 48, rngs=nnx.Rngs(0))(rows, SLOTS)


@pytest.mark.slow
def test_router_and_experts_compose_to_the_layer(rows):
    from jax_moe_lora.layer.routing import route

    router, experts = Router(CONFIG, rngs=nnx.Rngs(0)), RoutedExperts(CONFIG, rngs=nnx.Rngs(1))

    @jax.jit
    def composed(x):
        return experts(x, *route(router(x), CONFIG))

    @jax.jit
    def whole(x):
        return moe_lora(x, router.weight[...], experts.weights, CONFIG)

    np.testing.assert_array_equal(composed(rows), whole(rows))


@pytest.mark.newest
@pytest.mark.slow
def test_linear_module_equals_the_pure_function(rows):
    sites = {"linear": Site(64, 48, 1, (0,))}
    layer = LoRALinear(64, 48, max_adapters=3, max_rank=16, rngs=nnx.Rngs(0))
    load(layer, lambda bank: insert(bank, 1, adapter(sites, 5)))
    pages = layer.adapters.bank.layer(0)["linear"]
    expected = jax.jit(lambda x: lora_linear(x, layer.weight[...], None, pages, dense_plan(SLOTS, 3)))(rows)
    np.testing.assert_array_equal(nnx.jit(lambda m, x: m(x, SLOTS))(layer, rows), expected)
    plain = LoRALinear(64, 48, rngs=nnx.Rngs(0))
    base = nnx.jit(lambda m, x: m(x))(plain, rows)
    np.testing.assert_array_equal(base[1], expected[1])


def test_slots_that_a_bank_does_not_have_are_refused(layer, rows):
    with pytest.raises(InputError, match=r"slots has 4; expected -1 \(the base model\) to 3"):
        layer(rows, SLOTS + 2)
    with pytest.raises(InputError, match="slots has -2"):
        layer(rows, request_lengths=jnp.array([1]), request_slots=jnp.array([-2]))
