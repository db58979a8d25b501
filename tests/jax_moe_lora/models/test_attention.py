"""Attention without masks: the same as with dense ones, and which backend a call gets and why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.models.blocks.attention import attend_cache, attend_prompt, choose_attention

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


def test_the_choice_says_why_not_cudnn():
    choice = choose_attention(dtype="bfloat16", **HEADS)
    assert choice.picked == "xla"
    assert "needs an NVIDIA GPU" in choice.why_not["cudnn"]
    assert "was asked for" in choose_attention("xla", dtype="bfloat16", **HEADS).why_not["cudnn"]
