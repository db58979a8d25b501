"""The routers that few families have, against their definitions and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_moe_lora import InputError
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer.routing import route, route_in_kernel

pytestmark = pytest.mark.optimised

TOKENS, EXPERTS = 64, 8
SCORES = np.random.default_rng(0).normal(size=(TOKENS, EXPERTS)).astype(np.float32)
MIXER = MoEConfig(4, 4, EXPERTS, 2, router="sparsemixer", jitter=0.3)  # wide: several scores count


@pytest.mark.parity
def test_sparsemixer_chooses_and_weighs_as_transformers_does():
    import torch
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    scores = np.concatenate([SCORES, np.zeros((1, EXPERTS), np.float32), -np.abs(SCORES[:4])])
    expected, expected_experts = sparsemixer(torch.tensor(scores), MIXER.jitter, training=False)
    weights, experts = route(jnp.asarray(scores), MIXER)
    np.testing.assert_array_equal(experts, expected_experts)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert (expected.sum(-1) > 1).any(), "no weights that a renormalisation would change"


@pytest.mark.parity
def test_the_gradient_of_sparsemixer_is_that_of_its_softmaxes():
    import torch
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    scores = torch.tensor(SCORES, requires_grad=True)
    sparsemixer(scores, MIXER.jitter, training=False)[0].square().sum().backward()
    gradient = jax.grad(lambda s: jnp.square(route(s, MIXER)[0]).sum())(jnp.asarray(SCORES))
    np.testing.assert_allclose(gradient, scores.grad, rtol=1e-5, atol=1e-6)


def test_sparsemixer_gives_chosen_experts_the_weights_of_its_own_choice():
    weights, experts = route(jnp.asarray(SCORES), MIXER)
    again, same = route(jnp.asarray(SCORES), MIXER, chosen=experts)
    np.testing.assert_array_equal(same, experts)
    np.testing.assert_array_equal(again, weights)
    other = (np.asarray(experts) + 1) % EXPERTS
    np.testing.assert_array_equal(route(jnp.asarray(SCORES), MIXER, chosen=jnp.asarray(other))[1], other)


def test_sparsemixer_refuses_another_number_of_experts():
    with pytest.raises(InputError, match=r"config\.top_k is 3; a sparsemixer router chooses 2"):
        route(jnp.asarray(SCORES), MoEConfig(4, 4, EXPERTS, 3, router="sparsemixer"))


def test_a_softmax_bias_moves_the_choice_alone():
    config = MoEConfig(4, 4, EXPERTS, 2, router="softmax_bias")
    bias = np.zeros(EXPERTS, np.float32)
    bias[3] = 1.0
    weights, experts = route(jnp.asarray(SCORES), config, jnp.asarray(bias))
    assert (np.asarray(experts)[:, 0] == 3).all()
    np.testing.assert_allclose(weights[:, 0], jax.nn.softmax(SCORES, axis=-1)[:, 3], rtol=1e-6)


def test_a_sum_of_weights_counts_as_its_floor_at_least():
    scores = np.full((1, EXPERTS), -20, np.float32)
    scores[0, 0] = 20
    bias = jnp.arange(EXPERTS, dtype=jnp.float32)  # the two last experts are chosen, with weights near zero
    config = MoEConfig(4, 4, EXPERTS, 2, router="softmax_bias", renormalize=True, renormalize_floor=1e-12)
    weights, experts = route(jnp.asarray(scores), config, bias)
    assert sorted(np.asarray(experts)[0]) == [6, 7]
    np.testing.assert_allclose(weights, np.exp(-40) / 1e-12 * np.ones((1, 2)), rtol=1e-4)


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid_bias"])
@pytest.mark.parametrize("padding", [False, True])
def test_the_kernels_choice_and_its_gradient_are_those_through_xla(router, padding):
    rng = np.random.default_rng()
    scores, bias, dw = (jnp.asarray(rng.normal(size=shape), "float32") for shape in ((6, 32), 32, (6, 4)))
    config = MoEConfig(4, 4, 32, 4, router=router, renormalize=True, renormalize_eps=1e-20, scaling=2.5)
    row_mask = jnp.asarray([True, False, True, True, False, True]) if padding else None

    def loss(backend, scores, bias):
        weights, experts = route_in_kernel(scores, config, bias, backend, row_mask)
        return (weights * dw).sum(), (weights, experts)

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found = jax.value_and_grad(loss, (1, 2), has_aux=True)("hopper", scores, bias)
    expected = jax.value_and_grad(loss, (1, 2), has_aux=True)("xla", scores, bias)
    if padding:
        masked = np.array([1, 4])
        np.testing.assert_array_equal(found[0][1][1][masked], np.full((2, 4), 32))
    for result, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-6)


def test_without_a_kernel_for_a_router_its_choice_is_xlas():
    config = MoEConfig(4, 4, EXPERTS, 2)
    found = route_in_kernel(jnp.asarray(SCORES), config, None, "hopper")
    for result, wanted in zip(found, route(SCORES, config), strict=True):
        np.testing.assert_array_equal(result, wanted)
