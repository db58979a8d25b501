"""Contract 7 for the layer: an argument of another dtype, size or name is refused, never cast, broadcast or ignored.

All of it follows from shapes and dtypes alone, so it is the same under `jit` and costs the compiled program nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_moe_lora import InputError
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer import checks
from jax_moe_lora.layer.linear import dense_plan, lora_linear
from jax_moe_lora.layer.moe import moe_lora, routed_experts, router_scores
from jax_moe_lora.layer.routing import route
from jax_moe_lora.models.families.examples import example
from jax_moe_lora.models.families.registry import FAMILIES
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.nn import LoRALinear, MoELoRA, load
from pallas_kernels.ops import LayerPages, LoRAPages
from pallas_kernels.routed_experts.weights import ExpertWeights
from support.unchecked import annotations_unchecked

pytestmark = pytest.mark.optimised

T, D, F, E, K, S = 5, 8, 16, 4, 2, 3
CONFIG = MoEConfig(D, F, E, K)


@pytest.fixture(autouse=True)
def _as_users_run_it() -> Iterator[None]:
    with annotations_unchecked():
        yield


def floats(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def ints(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


def pages(in_width: int, out_width: int, experts: int = E, slots: int = S) -> LoRAPages:
    table = ints(slots, experts, 4)
    return LoRAPages(floats(2, 16, in_width), floats(2, 16, out_width), table, floats(slots, experts), 16)


def layer(**modules: LoRAPages) -> Any:
    """One layer's adapters."""
    return LayerPages.from_modules(modules)


EXPERTS = ExpertWeights(floats(E, F, D), floats(E, F, D), floats(E, D, F))
EXPERT_PAGES = {"gate": pages(D, F), "up": pages(D, F), "down": pages(F, D)}
ADAPTERS = layer(router=pages(D, E, 1), q=pages(D, D, 1), **EXPERT_PAGES)
ROWS = {"x": floats(T, D), "adapters": ADAPTERS, "slots": ints(T)}
LAYER = ROWS | {"router": floats(E, D), "experts": EXPERTS}
ROUTED = ROWS | {"weights": floats(T, K), "chosen": ints(T, K), "experts": EXPERTS}
LINEAR = {
    **{"x": floats(T, D), "weight": floats(F, D), "bias": floats(F)},
    **{"pages": pages(D, F, 1), "plan": dense_plan(ints(T), S)},
}
COMPLEX = jnp.complex64
with annotations_unchecked():
    COMPLEX_PAGES = replace(pages(D, F), a=floats(2, 16, D).astype(COMPLEX))

# Of the routed layer, whether its router is run or was run before.
EITHER: dict[str, tuple[dict[str, Any], str]] = {
    "integer x": ({"x": ints(T, D)}, "x has dtype int32; expected floating point"),
    "complex x": ({"x": floats(T, D).astype(COMPLEX)}, "x has dtype complex64"),
    "x of another width": ({"x": floats(T, D + 1)}, r"x has shape \[5, 9\]; expected \[T, 8\]"),
    "x with a batch axis": ({"x": floats(1, T, D)}, r"x has shape \[1, 5, 8\]"),
    "x that is a list": ({"x": [[0.0] * D] * T}, "x is of type list; expected an array"),
    "one slot for all": ({"slots": ints(1)}, r"slots has shape \[1\]; expected \[5\]"),
    "a slot too many": ({"slots": ints(T + 1)}, r"slots has shape \[6\]; expected \[5\]"),
    "float slots": ({"slots": floats(T)}, "slots has dtype float32; expected integers"),
    "complex experts": ({"experts": replace(EXPERTS, up=EXPERTS.up.astype(COMPLEX))}, "up has dtype complex64"),
    "integer experts": ({"experts": replace(EXPERTS, down=ints(E, D, F))}, "down has dtype int32"),
    "one expert for all": ({"experts": replace(EXPERTS, gate=floats(1, F, D))}, r"gate has shape \[1, 16, 8\]"),
    "one bias for all experts": ({"experts": replace(EXPERTS, up_bias=floats(F))}, r"up_bias has shape \[16\]"),
    "experts as a tuple": ({"experts": (EXPERTS.gate, EXPERTS.up, EXPERTS.down)}, "experts are of type tuple"),
    "an unknown module": ({"adapters": layer(gates=pages(D, F))}, "adapters have a module 'gates'; expected some of"),
    "pages of a list": ({"adapters": [pages(D, F)]}, "adapters are of type list"),
    "pages of another width": ({"adapters": layer(up=pages(F, D))}, r"\['up'\]\.a has shape \[2, 16, 16\]"),
    "pages of other experts": ({"adapters": layer(up=pages(D, F, 1))}, r"\['up'\]\.table has shape \[3, 1, 4\]"),
    "pages of two banks": ({"adapters": layer(up=pages(D, F), gate=pages(D, F, slots=1))}, "slots that differ"),
    "complex pages": ({"adapters": layer(up=COMPLEX_PAGES)}, r"\['up'\]\.a has dtype complex64"),
}
WHOLE_LAYER: dict[str, tuple[dict[str, Any], str]] = {
    "biases nobody asked for": ({"experts": replace(EXPERTS, up_bias=floats(E, F))}, "that experts have no biases"),
    "router and scores": ({"scores": floats(T, E)}, "router together with scores"),
    "neither": ({"router": None}, "neither router nor scores"),
    "scores of other experts": ({"router": None, "scores": floats(T, E + 1)}, r"scores has shape \[5, 5\]"),
    "scores of one expert": ({"router": None, "scores": floats(T, 1)}, r"scores has shape \[5, 1\]"),
    "scores of other tokens": ({"router": None, "scores": floats(T + 1, E)}, r"scores has shape \[6, 4\]"),
    "scores of one token": ({"router": None, "scores": floats(1, E)}, r"scores has shape \[1, 4\]"),
    "integer scores": ({"router": None, "scores": ints(T, E)}, "scores has dtype int32"),
    "integer router": ({"router": ints(E, D)}, "router has dtype int32"),
    "complex router": ({"router": floats(E, D).astype(COMPLEX)}, "router has dtype complex64"),
    "router of other experts": ({"router": floats(E + 1, D)}, r"router has shape \[5, 8\]; expected \[4, 8\]"),
    "one mask for all": ({"row_mask": jnp.ones(1, bool)}, r"row_mask has shape \[1\]; expected \[5\]"),
    "a column of masks": ({"row_mask": jnp.ones((T, 1), bool)}, r"row_mask has shape \[5, 1\]"),
    "integer mask": ({"row_mask": ints(T)}, "row_mask has dtype int32; expected booleans"),
    "float mask": ({"row_mask": floats(T)}, "row_mask has dtype float32"),
    "one bias for all": ({"router_bias": floats(1)}, r"router_bias has shape \[1\]; expected \[4\]"),
    "a bias for each row": ({"router_bias": floats(T, E)}, r"router_bias has shape \[5, 4\]"),
    "integer bias": ({"router_bias": ints(E)}, "router_bias has dtype int32"),
}
AFTER_ROUTER: dict[str, tuple[dict[str, Any], str]] = {
    "float ids": ({"chosen": floats(T, K)}, "chosen has dtype float32; expected integers"),
    "boolean ids": ({"chosen": jnp.ones((T, K), bool)}, "chosen has dtype bool"),
    "ids of another K": ({"chosen": ints(T, K + 1)}, r"chosen has shape \[5, 3\]; expected \[5, 2\]"),
    "weights of another K": ({"weights": floats(T, K + 1)}, r"weights has shape \[5, 3\]"),
    "one weight for all experts": ({"weights": floats(T, 1)}, r"weights has shape \[5, 1\]"),
    "both of another K": ({"chosen": ints(T, 1), "weights": floats(T, 1)}, r"has shape \[5, 1\]; expected \[5, 2\]"),
    "ids of other tokens": ({"chosen": ints(1, K)}, r"chosen has shape \[1, 2\]"),
    "integer weights": ({"weights": ints(T, K)}, "weights has dtype int32"),
    "complex weights": ({"weights": floats(T, K).astype(COMPLEX)}, "weights has dtype complex64"),
    "no rows, but slots": ({"x": floats(0, D), "chosen": ints(0, K), "weights": floats(0, K)}, "slots has shape"),
}
ONE_LINEAR: dict[str, tuple[dict[str, Any], str]] = {
    "integer x": ({"x": ints(T, D)}, "x has dtype int32"),
    "x of another width": ({"x": floats(T, F)}, r"x has shape \[5, 16\]; expected \[T, 8\]"),
    "complex weight": ({"weight": floats(F, D).astype(COMPLEX)}, "weight has dtype complex64"),
    "integer weight": ({"weight": ints(F, D)}, "weight has dtype int32"),
    "one bias for all": ({"bias": floats(1)}, r"bias has shape \[1\]; expected \[16\]"),
    "integer bias": ({"bias": ints(F)}, "bias has dtype int32"),
    "pages of experts": ({"pages": pages(D, F)}, r"pages\.table has shape \[3, 4, 4\]; expected \[S, 1, 4\]"),
    "pages of another width": ({"pages": pages(F, D, 1)}, r"pages\.a has shape \[2, 16, 16\]"),
    "a plan of one row": ({"plan": dense_plan(ints(1), S)}, r"plan\.slots has shape \[1\]; expected \[5\]"),
    "a plan of other slots": ({"plan": dense_plan(ints(T), 1)}, "made for 1 slots, the pages have 3"),
    "no plan": ({"plan": None}, "got pages and no plan"),
}


def in_config(function: Callable) -> Callable:
    return lambda **arguments: function(config=CONFIG, **arguments)


FUNCTIONS: list[tuple[str, Callable, dict[str, Any], dict[str, tuple[dict[str, Any], str]]]] = [
    ("moe_lora", in_config(moe_lora), LAYER, EITHER | WHOLE_LAYER),
    ("routed_experts", in_config(routed_experts), ROUTED, EITHER | AFTER_ROUTER),
    ("lora_linear", lora_linear, LINEAR, ONE_LINEAR),
]
CASES = [
    pytest.param(function, good | changed, message, id=f"{name}: {what}")
    for name, function, good, cases in FUNCTIONS
    for what, (changed, message) in cases.items()
]


@pytest.mark.parametrize(("function", "arguments", "message"), CASES)
def test_what_would_be_cast_broadcast_or_ignored_is_refused(function, arguments, message):
    with pytest.raises(InputError, match=message):
        function(**arguments)
    if any(isinstance(value, list) for value in arguments.values()):
        return  # jit takes lists apart
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda arguments: function(**arguments), arguments)  # as jit traces it


@pytest.mark.parametrize(("function", "arguments"), [(function, good) for _, function, good, _ in FUNCTIONS])
def test_the_arguments_that_the_cases_change_are_accepted(function, arguments):
    assert jax.eval_shape(lambda arguments: function(**arguments), arguments).shape[0] == T


def test_nothing_is_computed_before_the_checks():
    """Descriptions of arrays have a shape and a dtype, and cannot be computed with."""
    described = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), LAYER)
    with pytest.raises(InputError, match="row_mask has dtype"):
        moe_lora(config=CONFIG, **described, row_mask=jax.ShapeDtypeStruct((T,), jnp.int32))
    with pytest.raises(InputError, match="'nose'"):
        moe_lora(config=CONFIG, **described | {"adapters": layer(nose=pages(D, D, 1))})


def test_scores_that_were_computed_before_give_the_same_bits():
    rng = np.random.default_rng(0)
    x, router = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((T, D), (E, D)))
    weights = [jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for leaf in jax.tree.leaves(EXPERTS)]
    experts = ExpertWeights(*weights)
    run = jax.jit(lambda router, scores: moe_lora(x, router, experts, CONFIG, scores=scores))
    np.testing.assert_array_equal(run(router, None), run(None, router_scores(x, router)))


@pytest.mark.parametrize(
    ("scores", "bias", "message"),
    [
        (floats(T, E + 1), None, r"scores has shape \[5, 5\]; expected \[T, 4\]"),
        (floats(E), None, r"scores has shape \[4\]"),
        (ints(T, E), None, "scores has dtype int32"),
        (floats(T, E), floats(1), r"router_bias has shape \[1\]; expected \[4\]"),
        (floats(T, E), ints(E), "router_bias has dtype int32"),
    ],
)
@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid_bias", "softmax_bias", "sparsemixer"])
def test_route_refuses_scores_of_other_experts(scores, bias, message, router):
    with pytest.raises(InputError, match=message):
        route(scores, replace(CONFIG, router=router), bias)


@pytest.mark.parametrize("top_k", [0, E + 1, 1.5])
def test_more_experts_than_there_are_cannot_be_chosen(top_k):
    with pytest.raises(InputError, match=r"config\.top_k is"):
        route(floats(T, E), replace(CONFIG, top_k=top_k))


def test_router_scores_refuse_what_is_no_router():
    with pytest.raises(InputError, match="weight has dtype int32"):
        router_scores(floats(T, D), ints(E, D))
    with pytest.raises(InputError, match=r"slots has shape \[1\]"):
        router_scores(floats(T, D), floats(E, D), None, ints(1))


@pytest.mark.parametrize(
    ("slots", "num_slots", "message"),
    [
        (floats(T), S, "slots has dtype float32"),
        (ints(T, 1), S, r"slots has shape \[5, 1\]"),
        ([0, 1], S, "slots is of type list"),
        (ints(T), 1.5, "num_slots is 1.5"),
        (ints(T), True, "num_slots is True"),
    ],
)
def test_a_dense_plan_refuses_other_slots(slots, num_slots, message):
    with pytest.raises(InputError, match=message):
        dense_plan(slots, num_slots)


@pytest.mark.slow
def test_modules_refuse_slots_that_they_have_no_use_for():
    for module in (LoRALinear(D, F, rngs=nnx.Rngs(0)), MoELoRA(CONFIG, rngs=nnx.Rngs(0))):
        with pytest.raises(InputError, match="slots came to a module without an adapter bank"):
            module(floats(T, D), ints(T))
    with pytest.raises(InputError, match=r"slots has shape \[1\]"):
        LoRALinear(D, F, max_adapters=1, max_rank=16, rngs=nnx.Rngs(0))(floats(T, D), ints(1))


def test_a_module_keeps_its_bank_when_a_change_gives_none():
    layer = LoRALinear(D, F, max_adapters=1, max_rank=16, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="The new bank is of type NoneType"):
        load(layer, lambda bank: None)
    assert layer(floats(T, D), ints(T)).shape == (T, F)


def test_the_known_modules_are_those_of_every_family():
    configs = [of.read_config(example(name), None, name) for name, of in FAMILIES.items()]
    modules = {module for config in configs for module in layer_sites(config)}
    # Where values are no keys, Gemma's layers without a window have this one too.
    assert modules | {"global_v"} == {*checks.MODULES}
