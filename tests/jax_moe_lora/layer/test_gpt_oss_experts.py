"""gpt-oss's experts (biases, clamped SwiGLU) against the modules of transformers, adapters merged into the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer.moe import routed_experts
from jax_moe_lora.layer.reference import moe_lora as oracle
from support.layers import LAYER, LAYOUTS, Problem, Spec, assert_close, draw

pytestmark = pytest.mark.parity

SPEC = Spec(tokens=24, hidden=48, width=32, as_gpt_oss=True)
EXPERTS = jax.jit(routed_experts, static_argnames=("config", "implementation"))


@pytest.fixture(scope="module")
def theirs() -> Any:
    """Their config; transformers is imported when a test asks for it."""
    from transformers import GptOssConfig

    return GptOssConfig(
        hidden_size=SPEC.hidden,
        intermediate_size=SPEC.width,
        num_local_experts=SPEC.experts,
        num_experts_per_tok=SPEC.top_k,
        num_hidden_layers=1,
    )


@pytest.fixture(scope="module")
def problem() -> Problem:
    return draw(SPEC)


@pytest.fixture(scope="module")
def routed() -> tuple[np.ndarray, np.ndarray]:
    """Each token's expert weights, and its experts."""
    rng = np.random.default_rng(7)
    chosen = np.stack([rng.permutation(SPEC.experts)[: SPEC.top_k] for _ in range(SPEC.tokens)])
    return rng.dirichlet(np.ones(SPEC.top_k), SPEC.tokens).astype(np.float32), chosen


def their_weights(problem: Problem, adapter: LoRAAdapter | None) -> dict[str, Any]:
    """Our weights as their experts hold them: `[E, in, out]`, gate and up in turn, and an adapter's update added."""
    import torch

    weights = {name: getattr(problem, name).copy() for name in ("gate", "up", "down")}
    for (_, name), own in adapter.weights.items() if adapter else ():
        if name in weights:
            weights[name] += np.stack([own.delta(expert) for expert in range(SPEC.experts)])

    def interleaved(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return np.stack((gate, up), axis=2).reshape(SPEC.experts, 2 * SPEC.width, *gate.shape[2:])

    found = {
        "gate_up_proj": interleaved(weights["gate"], weights["up"]).swapaxes(1, 2),
        "gate_up_proj_bias": interleaved(problem.biases["gate"], problem.biases["up"]),
        "down_proj": weights["down"].swapaxes(1, 2),
        "down_proj_bias": problem.biases["down"],
    }
    return {name: torch.tensor(value) for name, value in found.items()}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_each_rows_experts_equal_their_module_with_its_adapter_merged(problem, routed, theirs, implementation):
    import torch
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    weights, chosen = routed
    y = EXPERTS(
        jnp.asarray(problem.x),
        jnp.asarray(weights),
        jnp.asarray(chosen, jnp.int32),
        problem.experts,
        SPEC.config,
        problem.bank.layer(0),
        jnp.asarray(problem.slots, jnp.int32),
        implementation,
    )
    module = GptOssExperts(theirs)
    for slot, adapter in enumerate([*problem.adapters, None]):
        rows = problem.slots == (slot if adapter else -1)
        module.load_state_dict(their_weights(problem, adapter))
        with torch.no_grad():
            expected = module(*(torch.tensor(value[rows]) for value in (problem.x, chosen, weights))).numpy()
        assert_close(y[rows], expected, 1e-5)


def test_every_slot_and_every_limit_is_in_use(problem, routed):
    _, chosen = routed
    assert set(problem.slots) == set(range(-1, len(LAYOUTS)))
    gate, up = (
        np.einsum("td,tkfd->tkf", problem.x, getattr(problem, name)[chosen]) + problem.biases[name][chosen]
        for name in ("gate", "up")
    )
    assert min((gate > 7).sum(), (up > 7).sum(), (up < -7).sum()) > 0


def test_layer_and_oracle_equal_their_block_with_its_router(problem, theirs):
    """Scores with a bias, the K largest, softmax over these, experts."""
    import torch
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    router_bias = np.random.default_rng(3).normal(size=SPEC.experts).astype(np.float32)
    block = GptOssMLP(theirs)
    block.router.load_state_dict({"weight": torch.tensor(problem.router), "bias": torch.tensor(router_bias)})
    block.experts.load_state_dict(their_weights(problem, None))
    with torch.no_grad():
        expected = block(torch.tensor(problem.x)[None])[0][0].numpy()
    kind, activation = "topk_softmax", "clamped_swiglu"
    config = MoEConfig(SPEC.hidden, SPEC.width, SPEC.experts, SPEC.top_k, kind, activation=activation, expert_bias=True)
    x, router = jnp.asarray(problem.x), jnp.asarray(problem.router)
    ours = LAYER(x, router, problem.experts, config, router_bias=jnp.asarray(router_bias))
    assert_close(ours, expected, 1e-5)
    weights = (problem.x, problem.router, problem.gate, problem.up, problem.down)
    own = {"top_k": SPEC.top_k, "router_kind": kind, "router_bias": router_bias}
    assert_close(
        oracle(*weights, [None] * SPEC.tokens, **own, activation=activation, biases=problem.biases), expected, 1e-5
    )
