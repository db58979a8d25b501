"""Contract 10: which modules share a pool of pages is data about the layer, and survives `jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.layer.moe import routed_experts
from pallas_kernels import backend
from pallas_kernels.lora_steps import hopper
from support.paged import PagedSpec, draw_layer

SPEC = PagedSpec(14, 128, 192, 3, 2)


@pytest.fixture
def layouts(monkeypatch):
    """How the Hopper backend cuts the LoRA steps of each projection that is traced."""
    monkeypatch.setattr(backend, "device_capability", lambda: ((9, 0), "compute capability 9.0"))
    seen, layout_of = [], hopper.layout_of

    def recorded(*arguments):
        seen.append(layout_of(*arguments))
        return seen[-1]

    monkeypatch.setattr(hopper, "layout_of", recorded)
    return seen


def test_contract_10_sharing_survives_jit(layouts):
    layer = draw_layer(SPEC, np.random.default_rng(0))

    def run(adapters):
        return routed_experts(
            layer.x, layer.gates, layer.chosen, layer.experts, layer.config, adapters, layer.slots, "hopper"
        )

    leaves, structure = jax.tree.flatten(layer.adapters)
    calls = {
        "a constant": lambda: jax.eval_shape(lambda: run(layer.adapters)),
        "an argument": lambda: jax.eval_shape(run, layer.adapters),
        "its leaves": lambda: jax.eval_shape(lambda *leaves: run(jax.tree.unflatten(structure, leaves)), *leaves),
        "copies of its leaves": lambda: jax.eval_shape(
            lambda *leaves: run(jax.tree.unflatten(structure, leaves)), *map(jnp.copy, leaves)
        ),
    }
    found = {}
    for name, call in calls.items():
        layouts.clear()
        call()
        found[name] = list(layouts)
    assert all(found.values())
    assert all(layout == found["a constant"] for layout in found.values()), found
    assert found["a constant"][0].projections == 2
    assert found["a constant"][0].one_pool, "gate and up are read in one pass"
