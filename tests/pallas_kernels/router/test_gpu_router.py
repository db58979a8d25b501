"""The kernel that chooses experts, on a GPU: `JAX_PLATFORMS=cuda pytest -m gpu -k gpu_router`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.router.portable import route
from support.decode_kernels import Router, assert_routes_by_definition

pytestmark = pytest.mark.gpu("portable")

ROUTERS = {
    "Qwen3-30B-A3B": Router("softmax_topk", 128, 8, scaling=1.0),
    "gpt-oss-20b": Router("topk_softmax", 32, 4, renormalize=False, scaling=1.0),
    "sigmoids of 512": Router("sigmoid_bias", 512, 10),
    "softmax of 96": Router("softmax_bias", 96, 2, renormalize_floor=0.5),
}


@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 32, 3001])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_the_kernel_chooses_and_weighs_by_definition(router, tokens):
    assert_routes_by_definition(router, tokens)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_a_token_has_the_bits_that_it_has_alone(router):
    scores = jnp.asarray(np.random.default_rng().normal(size=(39, router.num_experts)), jnp.float32)
    call = jax.jit(lambda scores: route(scores, None, router.router.endswith("_bias"), router))
    together = call(scores)
    for token in range(39):
        for result, alone in zip(together, call(scores[token : token + 1]), strict=True):
            np.testing.assert_array_equal(result[token], alone[0])


def test_a_token_of_nan_has_weights_of_nan_at_experts_that_there_are():
    scores = jnp.asarray(np.random.default_rng().normal(size=(6, 128)), jnp.float32)
    router = ROUTERS["Qwen3-30B-A3B"]
    weights, experts = route(scores.at[1].set(jnp.nan).at[4, 9].set(jnp.nan), None, False, router)
    np.testing.assert_array_equal(np.isnan(weights).all(axis=1), [False, True, False, False, True, False])
    assert bool((experts < 128).all())


@pytest.mark.parametrize("tokens", [5, 8, 300])
def test_padding_has_no_weight_at_no_expert_and_the_others_keep_their_bits(tokens):
    rng = np.random.default_rng()
    router, real = ROUTERS["Qwen3-30B-A3B"], rng.random(tokens) < 0.5
    scores = jnp.asarray(rng.normal(size=(tokens, 128)), jnp.float32)
    expected = route(scores, None, False, router)
    broken = jnp.where(real[:, None], scores, jnp.nan)
    weights, experts = route(broken, None, False, router, jnp.asarray(real))
    for result, wanted in zip((weights, experts), expected, strict=True):
        np.testing.assert_array_equal(result[real], wanted[real])
    assert bool((weights[~real] == 0).all())
    assert bool((experts[~real] == 128).all())
