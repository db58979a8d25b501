"""The probes of TensorRT-LLM's routed-expert LoRA, against a float32 reference in plain torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import LoRAAdapter, uniform
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer.moe import routed_experts
from jax_moe_lora.nn import moe_sites
from jax_moe_lora.parity import torch_reference as routed_experts_in_torch
from pallas_kernels.routed_experts.weights import ExpertWeights
from support.layers import assert_close, rounded
from support.pairs import covering_pairs

pytestmark = pytest.mark.parity

# TensorRT-LLM's names: fc1 is the gate projection (the silu side), gated the up projection, fc2 the down projection.
MODULE = {"fc1": "gate", "gated": "up", "fc2": "down"}
PROBES = {
    "none": (),
    "zero": ("fc1", "gated", "fc2"),
    "only fc1": ("fc1",),
    "only gated": ("gated",),
    "only fc2": ("fc2",),
    "fc1 and gated": ("fc1", "gated"),
    "fc1 and fc2": ("fc1", "fc2"),
    "gated and fc2": ("gated", "fc2"),
    "gated aliased to fc1": ("fc1", "gated", "fc2"),
    "per-expert": ("fc1", "gated", "fc2"),
    "shared-outer": ("fc1", "gated", "fc2"),
}
SHAPES = {  # T, H, I, E, k, r
    "theirs": (16, 128, 256, 4, 2, 8),
    "odd": (13, 96, 80, 5, 3, 20),
    "wide": (7, 64, 192, 16, 4, 16),
    "one expert each": (33, 48, 64, 8, 1, 3),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
LAYER = jax.jit(routed_experts, static_argnames="config")


def torch_reference(x, weights, chosen, base, adapter) -> np.ndarray:
    """The library's plain torch definition, with the adapter on every token."""
    loaded = {MODULE[name]: (a, b, 1.0) for name, (a, b) in adapter.items()}
    experts = {MODULE[name]: w for name, w in base.items()}
    return routed_experts_in_torch(x, chosen, weights, experts, [loaded], [0] * len(x)).numpy()


def draw(shape: str, probe: str, dtype: str, seed: int = 0):
    tokens, hidden, inner, experts, top_k, rank = SHAPES[shape]
    rng = np.random.default_rng(seed)

    def normal(*size: int, scale: float) -> np.ndarray:
        return rounded(scale * rng.normal(size=size), dtype)

    widths = {"fc1": (inner, hidden), "gated": (inner, hidden), "fc2": (hidden, inner)}
    base = {name: normal(experts, *size, scale=0.02) for name, size in widths.items()}
    adapter = {}
    for name in PROBES[probe]:
        out_width, in_width = widths[name]
        lead_a, lead_b = experts, experts
        if probe == "shared-outer":
            lead_a, lead_b = (1, experts) if name != "fc2" else (experts, 1)
        scale = 0.0 if probe == "zero" else 0.25
        adapter[name] = normal(lead_a, rank, in_width, scale=0.25), normal(lead_b, out_width, rank, scale=scale)
    if probe == "gated aliased to fc1":
        adapter["gated"] = adapter["fc1"]
    x = normal(tokens, hidden, scale=1.0)
    chosen = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.dirichlet(np.ones(top_k), tokens).astype(np.float32)
    return x, weights, chosen, base, adapter


def run(shape: str, dtype: str, x, weights, chosen, base, adapter) -> np.ndarray:
    _, hidden, inner, experts, top_k, rank = SHAPES[shape]
    config = MoEConfig(hidden, inner, experts, top_k)
    bank = create_bank(moe_sites(config), 2, rank, None, dtype)
    if adapter:
        loaded = {(0, MODULE[name]): uniform(a, b, 1.0, experts) for name, (a, b) in adapter.items()}
        bank = insert(bank, 1, LoRAAdapter("probe", loaded))
    experts_weights = ExpertWeights(**{MODULE[name]: jnp.asarray(w, dtype) for name, w in base.items()})
    slots = jnp.full(len(x), 1 if adapter else -1, jnp.int32)
    arguments = (jnp.asarray(x, dtype), jnp.asarray(weights), jnp.asarray(chosen), experts_weights, config)
    return np.asarray(LAYER(*arguments, bank.layer(0), slots).astype(jnp.float32))


@covering_pairs(shape=SHAPES, probe=PROBES, dtype=TOLERANCE)
def test_probe_equals_the_torch_reference(shape, probe, dtype):
    problem = draw(shape, probe, dtype)
    assert_close(run(shape, dtype, *problem), torch_reference(*problem), TOLERANCE[dtype])


def test_fc1_is_gate_and_gated_is_up_and_fc2_is_down():
    """With the names of gate and up exchanged the result is another: the mapping is no matter of taste."""
    problem = draw("theirs", "per-expert", "float32")
    expected = torch_reference(*problem)
    x, weights, chosen, base, adapter = problem
    exchanged = {**adapter, "fc1": adapter["gated"], "gated": adapter["fc1"]}
    wrong = run("theirs", "float32", x, weights, chosen, base, exchanged)
    assert np.linalg.norm(wrong - expected) > 0.1 * np.linalg.norm(expected)
    assert (MODULE["fc1"], MODULE["gated"], MODULE["fc2"]) == ("gate", "up", "down")
