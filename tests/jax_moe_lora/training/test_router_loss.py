"""The router's auxiliary loss is made of what its own kind of router chooses by, and of probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import InputError
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.training.loss import load_balancing
from support.unchecked import annotations_unchecked

TOKENS, EXPERTS, TOP_K, SLOTS = 40, 8, 2, 2
KINDS = ("softmax_topk", "topk_softmax", "sigmoid_bias", "softmax_bias", "sparsemixer")


def config(kind: str, **options) -> MoEConfig:
    return MoEConfig(4, 4, EXPERTS, TOP_K, router=kind, **options)


def draw() -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    scores = [(2 * rng.standard_normal((TOKENS, EXPERTS)) - 1).astype(np.float32) for _ in range(2)]
    return scores, rng.integers(-1, SLOTS, TOKENS).astype(np.int32)


def probabilities_of(row: np.ndarray, kind: str) -> np.ndarray:
    if kind == "sigmoid_bias":  # DeepSeek-V3, equation 19
        affinity = 1 / (1 + np.exp(-row))
        return affinity / affinity.sum()
    return np.exp(row - row.max()) / np.exp(row - row.max()).sum()


def expected(scores: list[np.ndarray], slots: np.ndarray, slot: int, kind: str) -> float:
    """`E * sum_e f_e P_e` in float64, token by token."""
    rows = [row.astype(np.float64) for layer in scores for row in layer[slots == slot]]
    chosen, probability = np.zeros(EXPERTS), np.zeros(EXPERTS)
    for row in rows:
        own = probabilities_of(row, kind)
        probability += own
        chosen[np.argsort(-own, kind="stable")[:TOP_K]] += 1
    return EXPERTS * float((chosen / len(rows) * probability / len(rows)).sum())


@pytest.mark.parametrize("options", [{}, {"renormalize": True, "scaling": 2.5}], ids=["plain", "scaled"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_router_loss_is_its_definition(kind, options):
    """What is done to the weights of the chosen experts afterwards is no part of it."""
    scores, slots = draw()
    found = load_balancing(tuple(map(jnp.asarray, scores)), jnp.asarray(slots), SLOTS, config(kind, **options))
    np.testing.assert_allclose(found, [expected(scores, slots, slot, kind) for slot in range(SLOTS)], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_even_routing_gives_the_least_loss_and_its_gradient_is_finite(kind):
    """With equal scores P is 1 / E, so that the loss is K; scores far out are no reason for a gradient to be NaN."""
    slots = jnp.zeros(TOKENS, jnp.int32)
    equal = jnp.zeros((TOKENS, EXPERTS), jnp.float32)
    np.testing.assert_allclose(load_balancing((equal,), slots, 1, config(kind)), [TOP_K], rtol=1e-6)
    gradient = jax.grad(lambda scores: load_balancing((scores,), slots, 1, config(kind)).sum())
    for far in (-200.0, 200.0):
        assert bool(jnp.isfinite(gradient(jnp.full_like(equal, far))).all())


def test_an_unknown_router_has_no_loss():
    with annotations_unchecked(), pytest.raises(InputError, match="router is 'dice'"):
        load_balancing((jnp.zeros((2, EXPERTS)),), jnp.zeros(2, jnp.int32), 1, config("dice"))
