"""The gated delta rule: a state per head, `[dk, dv]`, that decays and is corrected towards each token's value.

For a token with query q, key k, value v, log-decay g and step b, in float32:

    S <- exp(g) S;    d = b (v - S^T k);    S <- S + k d^T;    y = S^T q

`chunked` computes a whole prompt by matrix products over chunks of tokens (arXiv:2412.06464, section 3.3): with G the
sum of g from the chunk's first token on, the rows of d in one chunk solve a triangular system,

    d_i + sum_{j < i} b_i (k_i . k_j) exp(G_i - G_j) d_j = b_i (v_i - exp(G_i) S^T k_i).

Its right side is linear in S, so d = U - W S, where U and W are made for all chunks at once. From chunk to chunk only
two products remain, d and the new state; y is again made for all chunks at once, from the states before them. "All" are
those of a block, so that the memory does not grow with the prompt.

Letters: B requests, T tokens of a request, M blocks of N chunks of C tokens, G key heads, R value heads of a key head,
dk and dv widths of a key's and a value's head.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from pallas_kernels.varying import varying_as

CHUNK = 64
BLOCK = 16
UNROLL = 4  # chunks between two turns of the loop, whose own bookkeeping costs as much as a product
_EXACT = lax.Precision.HIGHEST

State = Float[Array, "B G R dk dv"]


class Tokens(NamedTuple):
    """What the rule reads of each token, float32. A token with g = b = 0 leaves the state as it is.

    Attributes:
      q: queries.
      k: keys.
      v: values.
      g: logarithm of the decay, at most 0.
      b: size of the correction, 0 to 1.
    """

    q: Float[Array, "B T G dk"]
    k: Float[Array, "B T G dk"]
    v: Float[Array, "B T G R dv"]
    g: Float[Array, "B T G R"]
    b: Float[Array, "B T G R"]


def one_token(tokens: Tokens, state: State) -> tuple[Float[Array, "B 1 G R dv"], State]:
    """The rule for one token of each request, read from the state once.

    Args:
      tokens: T is 1.
      state: before the token.

    Returns:
      y, and the state after the token.
    """
    # Small rows, made once: XLA would make them again for every element of the state.
    q, k, v, g, b = (leaf[:, 0] for leaf in lax.optimization_barrier(tokens))
    decay = jnp.exp(g)[..., None]
    read = [jnp.sum(state * row[:, :, None, :, None], axis=-2) * decay for row in (q, k)]
    d = b[..., None] * (v - read[1])
    state = state * decay[..., None] + k[:, :, None, :, None] * d[..., None, :]
    y = read[0] + jnp.sum(q * k, axis=-1)[:, :, None, None] * d
    return y[:, None], state


def chunked(
    tokens: Tokens, state: State, segments: Int[Array, "B T"] | None = None, block: int = BLOCK
) -> tuple[Float[Array, "B T G R dv"], State]:
    """The rule for all tokens of each request.

    Args:
      tokens: in order.
      state: before the first token.
      segments: the example of each token where a row holds several, whose tokens lie side by side. Each begins with a
        state of zeros, and `state` must be zeros.
      block: chunks, at most, whose products are made at once (static).

    Returns:
      y, and the state after the last token.
    """
    batch, count = tokens.q.shape[:2]
    size = min(CHUNK, 1 << (count - 1).bit_length())
    chunks = -(-count // size)
    blocks = -(-chunks // block)
    shape = (blocks, -(-chunks // blocks), size)
    parts = [_split(leaf, shape, axis) for leaf, axis in zip(tokens, (-2, -2, -2, -1, -1), strict=True)]
    examples = None if segments is None else _examples(_split(segments, shape, -1))
    state, y = lax.scan(_one_block, varying_as(state, parts), (Tokens(*parts), examples))
    y = jnp.moveaxis(y, (2, 5), (0, 3))  # [B, M, N, C, G, R, dv]
    return y.reshape(batch, -1, *y.shape[4:])[:, :count], state


class _Examples(NamedTuple):
    """Of each token of a chunk: its example, and the one of the token before the chunk (0 for none)."""

    own: Int[Array, "*N B C"]
    before: Int[Array, "*N B"]


@jax.checkpoint  # what it makes is larger than what it reads, and quickly made again for the gradients
def _one_block(state: State, block: tuple[Tokens, _Examples | None]) -> tuple[State, Float[Array, "N B G R C dv"]]:
    """The state after some chunks of tokens, and y: the memory that a prompt takes is that of one block."""
    (q, k, v, g, b), examples = block
    within, carried = _seen(examples, q.shape[-2])
    decays = _decays(g, within)
    before = jnp.where(carried, jnp.exp(jnp.cumsum(g, axis=-1)), 0.0)
    seen = before[..., None]
    solve = _unit_lower_inverse(b[..., None] * _products(k, k)[:, :, :, None] * decays)
    of_values = jnp.matmul(solve, b[..., None] * v, precision=_EXACT)
    of_state = jnp.matmul(solve, b[..., None] * seen * k[:, :, :, None], precision=_EXACT)
    added = jnp.swapaxes(decays[..., -1, :, None] * k[:, :, :, None], -1, -2)
    state, (states, d) = lax.scan(_one_chunk, state, _Chunk(of_values, of_state, added, before[..., -1]), unroll=UNROLL)
    mix = _products(q, k)[:, :, :, None] * decays
    y = jnp.matmul(seen * q[:, :, :, None], states, precision=_EXACT) + jnp.matmul(mix, d, precision=_EXACT)
    return state, y


class _Chunk(NamedTuple):
    """What one chunk's step reads; under `scan` each has an axis N before these.

    Attributes:
      of_values: U, the corrections that a state of zeros would give.
      of_state: W, what the state before the chunk takes from them.
      added: the keys, turned, each with what is left of its correction after the chunk.
      after: what is left of the state after the chunk.
    """

    of_values: Float[Array, "B G R C dv"]
    of_state: Float[Array, "B G R C dk"]
    added: Float[Array, "B G R dk C"]
    after: Float[Array, "B G R"]


def _one_chunk(state: State, chunk: _Chunk) -> tuple[State, tuple[State, Float[Array, "B G R C dv"]]]:
    """The state after a chunk; the state before it, and the chunk's corrections."""
    d = chunk.of_values - jnp.matmul(chunk.of_state, state, precision=_EXACT)
    new = state * chunk.after[..., None, None] + jnp.matmul(chunk.added, d, precision=_EXACT)
    return new, (state, d)


def _split(x: Shaped[Array, "B T ..."], shape: tuple[int, int, int], axis: int) -> Shaped[Array, "M N B ..."]:
    """M blocks of N chunks, zeros behind the last token; a chunk's tokens along this axis."""
    missing = math.prod(shape) - x.shape[1]
    x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], *shape, *x.shape[2:]), (1, 2, 3), (0, 1, axis))


def _examples(own: Int[Array, "M N B C"]) -> _Examples:
    last = own[..., -1].reshape(-1, own.shape[2])
    before = jnp.concatenate((own[0, :1, :, 0], last[:-1]))  # before the first chunk the state is zeros
    return _Examples(own, before.reshape(own.shape[:3]))


def _seen(examples: _Examples | None, size: int) -> tuple[Bool[Array, "#N #B 1 1 C C"], Bool[Array, "#N #B 1 1 C"]]:
    """Which tokens of its chunk each token sees, and whether it sees the state before the chunk."""
    within = jnp.tril(jnp.ones((size, size), bool))[None, None]
    carried = jnp.ones((1, 1, size), bool)
    if examples is not None:
        within = within & (examples.own[..., :, None] == examples.own[..., None, :])
        carried = examples.own == examples.before[..., None]
    return within[:, :, None, None], carried[:, :, None, None]


def _decays(g: Float[Array, "N B G R C"], within: Bool[Array, "#N #B 1 1 C C"]) -> Float[Array, "N B G R C C"]:
    """What is left at token i of what token j wrote, 0 where i does not see j.

    The exponents are sums of their own: a difference of two sums from the chunk's first token would lose the digits of
    a slow decay behind a fast one.
    """
    later = jnp.tril(jnp.ones((g.shape[-1], g.shape[-1]), bool), -1)
    sums = jnp.cumsum(jnp.where(later[None, None, None, None], g[..., :, None], 0.0), axis=-2)
    return jnp.where(within, jnp.exp(sums), 0.0)


def _products(x: Float[Array, "N B G C dk"], y: Float[Array, "N B G C dk"]) -> Float[Array, "N B G C C"]:
    return jnp.einsum("nbgik,nbgjk->nbgij", x, y, precision=_EXACT)


def _unit_lower_inverse(a: Float[Array, "*B C C"]) -> Float[Array, "*B C C"]:
    """The inverse of 1 + the part of `a` below its diagonal; C is a power of two.

    From the inverses X and Y of two diagonal blocks follows that of the block that they span, with Z below X:
    [[X, 0], [-Y Z X, Y]]. Six times two products for C = 64, in place of a substitution row by row.
    """
    lead, size = a.shape[:-2], a.shape[-1]
    inverse = jnp.ones((*lead, size, 1, 1), a.dtype)
    width = 1
    while width < size:
        pairs = size // (2 * width)
        blocks = a.reshape(*lead, pairs, 2, width, pairs, 2, width)[..., :, 1, :, :, 0, :]
        below = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = -jnp.matmul(jnp.matmul(second, below, precision=_EXACT), first, precision=_EXACT)
        top = jnp.concatenate((first, jnp.zeros_like(first)), axis=-1)
        inverse = jnp.concatenate((top, jnp.concatenate((corner, second), axis=-1)), axis=-2)
        width *= 2
    return inverse[..., 0, :, :]
