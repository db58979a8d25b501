"""The gated delta rule's two forms against its definition, token by token in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.models.blocks.delta_rule import Tokens, chunked, one_token
from support.layers import assert_close

pytestmark = pytest.mark.optimised

B, G, R, DK, DV = 2, 2, 3, 8, 5
LIMIT = 2e-6


def draw(count: int, decay: float = 1.0, seed: int = 0) -> tuple[Tokens, jax.Array]:
    """Tokens whose keys have length one and whose log-decays are up to `decay`, and a state."""
    random = np.random.default_rng(seed)
    q, k = random.standard_normal((2, B, count, G, DK))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v, g = random.standard_normal((B, count, G, R, DV)), -decay * random.random((B, count, G, R)) ** 4
    b, state = random.random((B, count, G, R)), random.standard_normal((B, G, R, DK, DV))
    tokens = Tokens(*(jnp.asarray(leaf, jnp.float32) for leaf in (q, k, v, g, b)))
    return tokens, jnp.asarray(state, jnp.float32)


def definition(tokens: Tokens, state: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    q, k, v, g, b = (np.asarray(leaf, np.float64) for leaf in tokens)
    held, outputs = np.asarray(state, np.float64), []
    for t in range(q.shape[1]):
        held = held * np.exp(g[:, t])[..., None, None]
        d = b[:, t][..., None] * (v[:, t] - np.einsum("bgrkv,bgk->bgrv", held, k[:, t]))
        held = held + np.einsum("bgk,bgrv->bgrkv", k[:, t], d)
        outputs.append(np.einsum("bgrkv,bgk->bgrv", held, q[:, t]))
    return np.stack(outputs, axis=1), held


# Chunks have 64 tokens; 300 tokens are 5 chunks, in blocks of 1 or 2 of them.
@pytest.mark.parametrize(
    ("count", "block"), [*((count, 16) for count in (1, 2, 37, 63, 64, 65, 128, 150)), (300, 2), (130, 1)]
)
def test_chunks_of_any_number_of_tokens_are_the_rule(count: int, block: int) -> None:
    tokens, state = draw(count)
    run = jax.jit(partial(chunked, block=block))
    for found, expected in zip(run(tokens, state), definition(tokens, state), strict=True):
        assert_close(found, expected, LIMIT)


def test_a_slow_decay_behind_fast_ones_keeps_its_digits() -> None:
    tokens, state = draw(128, decay=40.0)
    for found, expected in zip(jax.jit(chunked)(tokens, state), definition(tokens, state), strict=True):
        assert_close(found, expected, LIMIT)


def test_one_token_is_the_rule() -> None:
    tokens, state = draw(1)
    for found, expected in zip(jax.jit(one_token)(tokens, state), definition(tokens, state), strict=True):
        assert_close(found, expected, LIMIT)


def test_the_state_goes_on_where_a_call_ended() -> None:
    tokens, state = draw(100)
    first, second = (Tokens(*(leaf[:, part] for leaf in tokens)) for part in (slice(70), slice(70, None)))
    y, between = chunked(first, state)
    z, last = chunked(second, between)
    expected, held = definition(tokens, state)
    assert_close(jnp.concatenate((y, z), axis=1), expected, LIMIT)
    assert_close(last, held, LIMIT)


@pytest.mark.parametrize("block", [16, 1])
def test_each_example_of_a_row_begins_with_a_state_of_zeros(block: int) -> None:
    tokens, state = draw(200)
    lengths, zeros = ([5, 60, 70, 65], [130, 1, 69]), jnp.zeros_like(state)
    segments = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths])
    y, _ = jax.jit(partial(chunked, block=block))(tokens, zeros, jnp.asarray(segments))
    for row, parts in enumerate(lengths):
        begin = 0
        for length in parts:
            alone = Tokens(*(leaf[row : row + 1, begin : begin + length] for leaf in tokens))
            assert_close(y[row, begin : begin + length], definition(alone, zeros[:1])[0][0], LIMIT)
            begin += length


def test_tokens_without_decay_and_step_leave_the_state_as_it_is() -> None:
    tokens, state = draw(9)
    padding = tokens._replace(g=jnp.zeros_like(tokens.g), b=jnp.zeros_like(tokens.b))
    assert (chunked(padding, state)[1] == state).all()
    one = Tokens(*(leaf[:, :1] for leaf in padding))
    assert (one_token(one, state)[1] == state).all()


def test_gradients_of_chunks_are_those_of_one_token_after_the_other() -> None:
    tokens, state = draw(70)
    weights = jax.random.normal(jax.random.key(1), tokens.v.shape)

    def by_token(tokens: Tokens, state: jax.Array) -> jax.Array:
        def step(state: jax.Array, token: Tokens) -> tuple[jax.Array, jax.Array]:
            y, state = one_token(Tokens(*(leaf[:, None] for leaf in token)), state)
            return state, y[:, 0]

        last, y = jax.lax.scan(step, state, Tokens(*(jnp.moveaxis(leaf, 1, 0) for leaf in tokens)))
        return (jnp.moveaxis(y, 0, 1) * weights).sum() + (last**2).sum()

    def by_chunk(tokens: Tokens, state: jax.Array) -> jax.Array:
        y, last = chunked(tokens, state)
        return (y * weights).sum() + (last**2).sum()

    found, expected = (jax.jit(jax.grad(f, (0, 1)))(tokens, state) for f in (by_chunk, by_token))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(one, np.asarray(other), 1e-5)
