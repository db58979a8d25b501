"""The arrays of `jax_moe_lora.inspect` are what their definitions say, written out here token by token."""

import numpy as np
import pytest

from jax_moe_lora import InputError, LoRAAdapter, LoRAWeights
from jax_moe_lora.adapters.lora import uniform
from jax_moe_lora.inspect import (
    changed_experts,
    coactivation,
    delta_norm,
    difference,
    divergence,
    effective_rank,
    entropy,
    expert_load,
    singular_values,
    spectra,
)

E, K = 5, 2


@pytest.fixture
def routing():
    rng = np.random.default_rng(0)
    draw = [[[rng.permutation(E)[:K] for _ in range(4)] for _ in range(3)] for _ in range(2)]
    return np.asarray(draw, np.int32), rng.random((3, 4)) < 0.6


def test_expert_load_counts_the_pairs_of_the_tokens_that_count(routing):
    experts, where = routing
    load = expert_load(experts, E, where)
    for layer in range(2):
        counts = np.bincount(experts[layer][where].ravel(), minlength=E)
        np.testing.assert_allclose(load[layer], counts / counts.sum(), rtol=1e-12)
    np.testing.assert_allclose(expert_load(experts, E).sum(-1), 1.0)


def test_coactivation_is_the_part_of_tokens_that_choose_both(routing):
    experts, where = routing
    together = coactivation(experts, E, where)
    tokens = np.argwhere(where)
    for layer, i, j in np.ndindex(2, E, E):
        both = sum({i, j} <= set(experts[layer, b, t].tolist()) for b, t in tokens)
        assert together[layer, i, j] == pytest.approx(both / len(tokens))


def test_changed_experts_ignores_order_and_padding(routing):
    experts, where = routing
    assert changed_experts(experts, experts[..., ::-1]).tolist() == [0.0, 0.0]
    others = experts.copy()
    others[1, 0, 0] = (others[1, 0, 0] + 1) % E
    where[:] = False
    where[0, :2] = True
    left = len(set(experts[1, 0, 0].tolist()) - set(others[1, 0, 0].tolist()))
    assert changed_experts(experts, others, where).tolist() == [0.0, left / (K * 2)]
    assert changed_experts(experts, others, ~where).tolist() == [0.0, 0.0]


def test_entropy_and_divergence_in_bits():
    p = np.array([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.25, 0.25, 0]], np.float32)
    np.testing.assert_allclose(entropy(p), [2, 0, 1.5], atol=1e-12)
    np.testing.assert_allclose(divergence(p, p), 0, atol=1e-12)
    apart = divergence(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.5, 0.5]]))
    np.testing.assert_allclose(apart, [1, 1.5 - 0.75 * np.log2(3)], atol=1e-12)  # H(3/4, 1/4) - H(1/2, 1/2) / 2


@pytest.mark.parametrize("side", ["own", "shared a", "shared b"])
def test_singular_values_are_those_of_the_materialised_update(side):
    rng = np.random.default_rng(1)
    rank, ranks = 6, np.array([6, 0, 3, 5, 1], np.int32)
    a = rng.normal(size=(1 if side == "shared a" else E, rank, 9)).astype(np.float32)
    b = rng.normal(size=(1 if side == "shared b" else E, 7, rank)).astype(np.float32)
    weights = LoRAWeights(a, b, ranks, np.array([2, 1, -0.5, 1, 3], np.float32))
    values = singular_values(weights)
    assert values.shape == (E, rank)
    for expert in range(E):
        expected = np.linalg.svd(weights.delta(expert), compute_uv=False)[:rank]
        np.testing.assert_allclose(values[expert], expected, atol=2e-5)
        assert delta_norm(values)[expert] == pytest.approx(np.linalg.norm(weights.delta(expert)), rel=1e-5)


def test_singular_values_where_a_width_is_below_the_rank():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(1, 8, 16)).astype(np.float32), rng.normal(size=(1, 3, 8)).astype(np.float32)
    values = singular_values(uniform(a, b, 1.0, 1))
    assert values.shape == (1, 8)
    np.testing.assert_allclose(values[0, :3], np.linalg.svd(b[0] @ a[0], compute_uv=False), rtol=1e-5)
    assert (values[0, 3:] == 0).all()


def test_effective_rank_is_the_number_of_even_directions():
    values = np.array([[3, 3, 3, 0], [5, 0, 0, 0], [0, 0, 0, 0], [3, 1, 0, 0]])
    share = np.array([0.75, 0.25])
    expected = [3, 1, 0, np.exp(-(share * np.log(share)).sum())]
    np.testing.assert_allclose(effective_rank(values), expected, rtol=1e-12)


def test_spectra_go_over_the_layers_that_have_the_module():
    rng = np.random.default_rng(3)

    def draw(rank: int) -> LoRAWeights:
        return uniform(rng.normal(size=(E, rank, 8)), rng.normal(size=(E, 6, rank)), 1.0, E)

    adapter = LoRAAdapter("mine", {(4, "gate"): draw(2), (1, "gate"): draw(4), (1, "down"): draw(3)})
    layers, values = spectra(adapter, "gate")
    assert layers == [1, 4]
    assert values.shape == (2, E, 4)
    np.testing.assert_array_equal(values[1, :, :2], singular_values(adapter.weights[4, "gate"]))
    assert (values[1, :, 2:] == 0).all()
    with pytest.raises(InputError, match="'mine' has no module 'up'; it has down, gate"):
        spectra(adapter, "up")


def test_difference_gives_the_three_figures_by_their_definitions():
    result, reference = np.array([3.0, 4.0], np.float32), np.array([0.0, 5.0], np.float32)
    found = difference(result, reference)
    assert (found.max_abs, found.equal) == (3.0, False)
    assert found.relative == pytest.approx(np.sqrt(10) / 5)
    assert found.cosine == pytest.approx(0.8)
    same = difference(np.zeros(3), -np.zeros(3))
    assert (same.max_abs, same.relative, same.cosine, same.equal) == (0.0, 0.0, 1.0, True)
    assert difference(np.ones(3), np.zeros(3)).relative == np.inf
    assert not difference(np.array([np.nan, 1.0]), np.ones(2)).relative < 1


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda e: expert_load(e, 3), "Expert ids go from 0 to 4; expected 0 to 2"),
        (lambda e: expert_load(e[0], E), "The routing is .*; expected expert ids"),
        (lambda e: coactivation(e, E, np.zeros((3, 4), bool)), "where is False for every token"),
        (lambda e: expert_load(e, E, np.ones((4, 3), bool)), r"where is bool \[4, 3\]; expected bool \[3, 4\]"),
        (lambda e: changed_experts(e, e[:1]), "give two of the same shape"),
        (lambda e: difference(np.ones(2), np.ones((2, 1))), "give two of one shape"),
    ],
)
def test_bad_shapes_are_refused_in_a_sentence(routing, call, sentence):
    with pytest.raises(InputError, match=sentence):
        call(routing[0])
