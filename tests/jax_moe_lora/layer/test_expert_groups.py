"""Routers that choose among the experts of their best groups, against the definition written out token by token."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import InputError
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer.reference import moe_lora as oracle
from jax_moe_lora.layer.routing import route
from support.unchecked import annotations_unchecked

E, K, T = 12, 3, 50
DEEPSEEK_V3 = MoEConfig(
    *(8, 8, E, K, "sigmoid_bias"),
    renormalize=True,
    renormalize_eps=1e-20,
    scaling=2.5,
    num_groups=4,
    top_groups=2,
    group_score="top2_sum",
)
CONFIGS = {
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v2": MoEConfig(8, 8, E, K, scaling=16.0, num_groups=4, top_groups=1),
    "mistral4": replace(DEEPSEEK_V3, router="softmax_topk", scaling=1.0, num_groups=3),
    "one group": replace(DEEPSEEK_V3, num_groups=1, top_groups=1),
    "all groups": replace(DEEPSEEK_V3, top_groups=4),
    "groups of one": MoEConfig(8, 8, E, K, "topk_softmax", num_groups=E, top_groups=5),
}


def expected(row: np.ndarray, bias: np.ndarray, config: MoEConfig) -> dict[int, float]:
    """Expert -> weight, in float64."""
    row = row.astype(np.float64)
    sigmoid = config.router == "sigmoid_bias"
    softmax = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    values = 1 / (1 + np.exp(-row)) if sigmoid else softmax if config.router == "softmax_topk" else row
    choice = values + bias if sigmoid else values
    size = E // config.num_groups
    score = {}
    for group in range(config.num_groups):
        best = sorted(choice[group * size : (group + 1) * size], reverse=True)
        score[group] = best[0] if config.group_score == "max" else sum(best[:2])
    kept = sorted(score, key=lambda group: -score[group])[: config.top_groups]
    experts = sorted((e for e in range(E) if e // size in kept), key=lambda e: -choice[e])[:K]
    weights = values[experts]
    if config.router == "topk_softmax":
        weights = np.exp(weights - weights.max()) / np.exp(weights - weights.max()).sum()
    if config.renormalize:
        weights = weights / (weights.sum() + config.renormalize_eps)
    return dict(zip(experts, config.scaling * weights, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_experts_and_weights_are_those_of_the_best_groups(name):
    config, rng = CONFIGS[name], np.random.default_rng(3)
    scores = (2 * rng.standard_normal((T, E)) - 1).astype(np.float32)
    # Below zero, so that an expert of a group that is left out cannot win by a mask of zeros.
    bias = rng.standard_normal(E).astype(np.float32) - 2
    used = bias if config.router == "sigmoid_bias" else np.zeros_like(bias)
    weights, experts = jax.jit(lambda *some: route(some[0], config, some[1]))(scores, used)
    for row, found_weights, found_experts in zip(scores, np.asarray(weights), np.asarray(experts), strict=True):
        wanted = expected(row, used, config)
        assert list(found_experts) == list(wanted)
        np.testing.assert_allclose(found_weights, list(wanted.values()), rtol=2e-5)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "mistral4"])
def test_groups_leave_experts_out_that_would_have_been_chosen(name):
    scores = jnp.asarray(np.random.default_rng(3).standard_normal((T, E)), jnp.float32)
    config = CONFIGS[name]
    without = route(scores, replace(config, num_groups=1, top_groups=1))[1]
    assert (route(scores, config)[1] != without).any(axis=1).mean() > 0.2


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2", "mistral4"])
def test_the_reference_layer_has_the_same_groups(name):
    config, rng = replace(CONFIGS[name], hidden_size=E, expert_width=4), np.random.default_rng(4)
    x, router = rng.standard_normal((T, E)).astype(np.float32), np.eye(E, dtype=np.float32)
    # Experts of zeros, so that one's result is its bias: its number and one, at its own place.
    gate, down = np.zeros((E, 4, E), np.float32), np.zeros((E, E, 4), np.float32)
    bias = {"down": np.diag(np.arange(1, E + 1)).astype(np.float32)}
    y = oracle(
        *(x, router, gate, gate, down, [None] * T),
        top_k=K,
        router_kind=config.router,
        renormalize=config.renormalize,
        scaling=config.scaling,
        groups=(config.num_groups, config.top_groups, config.group_score),
        biases=bias,
    )
    for row, found in zip(x, y, strict=True):
        wanted = np.zeros(E)
        for expert, weight in expected(row, np.zeros(E), config).items():
            wanted[expert] = weight * (1 + expert)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_weights_that_are_all_zero_stay_finite():
    scores = jnp.full((2, E), -200.0)
    assert bool((route(scores, DEEPSEEK_V3)[0] == 0).all())


def test_gradients_reach_the_scores_of_the_chosen_experts_alone():
    scores = jnp.asarray(np.random.default_rng(5).standard_normal((T, E)), jnp.float32)
    gradient = jax.grad(lambda s: (route(s, DEEPSEEK_V3)[0] * jnp.arange(1.0, K + 1)[None]).sum())(scores)
    chosen = jax.nn.one_hot(route(scores, DEEPSEEK_V3)[1], E).sum(1) > 0
    assert bool(jnp.isfinite(gradient).all())
    assert bool((gradient[chosen] != 0).all())
    assert not bool(gradient[~chosen].any())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_groups": 5}, r"num_groups is 5; expected a divisor of the 12 experts"),
        ({"num_groups": 0}, r"num_groups is 0"),
        ({"top_groups": 5}, r"top_groups is 5; expected 1 to 4"),
        ({"num_groups": 6, "top_groups": 1}, r"top_groups is 1, groups of 2 experts each; expected room for top_k = 3"),
        ({"num_groups": 12, "top_groups": 6}, "groups of one expert"),
        ({"group_score": "mean"}, "group_score is 'mean'"),
    ],
)
def test_groups_that_make_no_sense_are_refused(changes, message):
    with annotations_unchecked(), pytest.raises(InputError, match=message):
        route(jnp.zeros((2, E)), replace(DEEPSEEK_V3, **changes))
