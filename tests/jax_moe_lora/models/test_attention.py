"""Attention without masks: the same as with dense ones, and which backend a call gets and why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.models.blocks.attention import (
    attend_cache,
    attend_packed,
    attend_prompt,
    choose_attention,
)
from support.layers import assert_close

pytestmark = pytest.mark.optimised

TOKENS = 11
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 6] * 3)
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


def defined(q, k, v, mask):
    """Softmax attention with a dense mask: heads of any dtype multiplied in float32, the sum rounded once."""
    with jax.default_matmul_precision("highest"):
        q, k, v = (heads.astype(jnp.float32) for heads in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, mask=mask)


def draw(sizes: list[tuple[int, int]], dtype: str):
    rng = np.random.default_rng()
    return [jnp.asarray(rng.normal(size=(3, length, heads, 16)), dtype) for length, heads in sizes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_sees_what_a_causal_mask_lets_it_see(dtype):
    q, k, v = draw([(7, 4), (7, 2), (7, 2)], dtype)
    mask = jnp.tril(jnp.ones((7, 7), bool))[None, None]
    np.testing.assert_array_equal(attend_prompt(q, k, v, "xla"), defined(q, k, v, mask).astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_sees_what_its_row_of_the_cache_holds(dtype):
    q, k, v = draw([(1, 4), (9, 2), (9, 2)], dtype)
    lengths = jnp.asarray([1, 5, 9])
    mask = (jnp.arange(9)[None, :] < lengths[:, None])[:, None, None, :]
    np.testing.assert_array_equal(attend_cache(q, k, v, lengths, "xla"), defined(q, k, v, mask).astype(dtype))


def with_sinks(q, k, v, sinks, window, segments):
    """Softmax over a token's scores and its head's sink, whose share is dropped."""
    k, v = (jnp.repeat(heads, 2, axis=2) for heads in (k, v))
    behind = jnp.arange(TOKENS)[:, None] - jnp.arange(TOKENS)[None]
    seen = (behind >= 0) & (behind < (window or TOKENS))
    seen = seen[None, None] & (segments[:, None, :, None] == segments[:, None, None, :])
    scores = jnp.where(seen, jnp.einsum("bthd,bshd->bhts", q, k) / 4, -jnp.inf)
    scores = jnp.concatenate((scores, jnp.broadcast_to(sinks[None, :, None, None], (3, 4, TOKENS, 1))), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1)[..., :-1], v)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_sinks_and_all_gradients_through_them_are_those_of_a_longer_softmax(window, packed):
    q, k, v = draw([(TOKENS, 4), (TOKENS, 2), (TOKENS, 2)], "float32")
    sinks, dy = jnp.asarray([0.5, -1.0, 2.0, 0.0]), draw([(TOKENS, 4)], "float32")[0]
    segments = SEGMENTS if packed else jnp.ones_like(SEGMENTS)

    def attend(q, k, v, sinks):
        if packed:
            return attend_packed(q, k, v, segments, "xla", window=window, sinks=sinks)
        return attend_prompt(q, k, v, "xla", window=window, sinks=sinks)

    with jax.default_matmul_precision("highest"):
        expected, expected_pullback = jax.vjp(lambda *some: with_sinks(*some, window, segments), q, k, v, sinks)
        y, pullback = jax.vjp(attend, q, k, v, sinks)
        for found, wanted in zip((y, *pullback(dy)), (expected, *expected_pullback(dy)), strict=True):
            assert_close(np.asarray(found), np.asarray(wanted), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 48])
def test_gradients_through_sinks_by_cudnn_are_those_by_xla(window, packed):
    rng, sinks = np.random.default_rng(), jnp.asarray([0.5, -1.0, 2.0, 0.0, 1.0, -2.0, 0.2, 0.1], "bfloat16")
    q, k, v, dy = (jnp.asarray(rng.normal(size=(2, 128, heads, 64)), "bfloat16") for heads in (8, 2, 2, 8))
    segments = jnp.asarray([[1] * 60 + [2] * 68] * 2)

    def gradients(backend):
        def attend(q, k, v, sinks):
            if packed:
                return attend_packed(q, k, v, segments, backend, window=window, sinks=sinks)
            return attend_prompt(q, k, v, backend, window=window, sinks=sinks)

        return jax.jit(lambda: jax.vjp(attend, q, k, v, sinks)[1](dy))()

    assert choose_attention(dtype="bfloat16", num_heads=8, num_kv_heads=2, head_dim=64).picked == "cudnn"
    for found, expected in zip(gradients("cudnn"), gradients("xla"), strict=True):
        assert_close(np.asarray(found, np.float32), np.asarray(expected, np.float32), 2e-2)


def test_the_choice_says_why_not_cudnn():
    choice = choose_attention(dtype="bfloat16", **HEADS)
    assert choice.picked == "xla"
    assert "needs an NVIDIA GPU" in choice.why_not["cudnn"]
    assert "was asked for" in choose_attention("xla", dtype="bfloat16", **HEADS).why_not["cudnn"]
