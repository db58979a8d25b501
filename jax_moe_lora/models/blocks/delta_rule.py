"""The gated delta rule: a state per head, `[dk, dv]`, that decays and is corrected towards each token's value.

For a token with query q, key k, value v, log-decay g and step b, in float32:

    S <- exp(g) S;    d = b (v - S^T k);    S <- S + k d^T;    y = S^T q

`chunked` computes a whole prompt by matrix products over chunks of tokens (arXiv:2412.06464, section 3.3): with G the
sum of g from the chunk's first token on, the rows of d in one chunk solve a triangular system,

    d_i + sum_{j < i} b_i (k_i . k_j) exp(G_i - G_j) d_j = b_i (v_i - exp(G_i) S^T k_i).

Letters: B requests, T tokens of a request, N chunks of C tokens, G key heads, R value heads of a key head, dk and dv
widths of a key's and a value's head.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

CHUNK = 64
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
    q, k, v, g, b = (leaf[:, 0] for leaf in tokens)
    decay = jnp.exp(g)[..., None]
    read = [jnp.sum(state * row[:, :, None, :, None], axis=-2) * decay for row in (q, k)]
    d = b[..., None] * (v - read[1])
    state = state * decay[..., None] + k[:, :, None, :, None] * d[..., None, :]
    y = read[0] + jnp.sum(q * k, axis=-1)[:, :, None, None] * d
    return y[:, None], state


@jax.checkpoint  # its chunks are larger than what it reads, and quickly made again for the gradients
def chunked(
    tokens: Tokens, state: State, segments: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T G R dv"], State]:
    """The rule for all tokens of each request.

    Args:
      tokens: in order.
      state: before the first token.
      segments: the example of each token where a row holds several, whose tokens lie side by side. Each begins with a
        state of zeros, and `state` must be zeros.

    Returns:
      y, and the state after the last token.
    """
    count = tokens.q.shape[1]
    size = min(CHUNK, 1 << (count - 1).bit_length())
    q, k, v, g, b = (_split(leaf, size, axis) for leaf, axis in zip(tokens, (-2, -2, -2, -1, -1), strict=True))
    within, carried = _seen(segments, size)
    decays = _decays(g, within)
    before = jnp.where(carried, jnp.exp(jnp.cumsum(g, axis=-1)), 0.0)
    solve = _unit_lower_inverse(b[..., None] * _products(k, k)[:, :, :, None] * decays)
    mix = _products(q, k)[:, :, :, None] * decays
    state, y = lax.scan(_one_chunk, state, _Chunk(q, k, v, b, before, decays[..., -1, :], solve, mix))
    y = jnp.moveaxis(y, (0, 4), (1, 2))  # [B, N, C, G, R, dv]
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :count], state


class _Chunk(NamedTuple):
    """What one chunk's step reads; under `scan` each has an axis N before these.

    Attributes:
      q: queries.
      k: keys.
      v: values.
      b: sizes of the corrections.
      before: what each token sees of the state before the chunk.
      after: what is left of each token's correction after the chunk.
      solve: the inverse of the system that gives the corrections.
      mix: what each token sees of the chunk's corrections.
    """

    q: Float[Array, "B G C dk"]
    k: Float[Array, "B G C dk"]
    v: Float[Array, "B G R C dv"]
    b: Float[Array, "B G R C"]
    before: Float[Array, "B G R C"]
    after: Float[Array, "B G R C"]
    solve: Float[Array, "B G R C C"]
    mix: Float[Array, "B G R C C"]


def _one_chunk(state: State, chunk: _Chunk) -> tuple[State, Float[Array, "B G R C dv"]]:
    both = jnp.concatenate((chunk.k, chunk.q), axis=-2)
    read = jnp.einsum("bgik,bgrkv->bgriv", both, state, precision=_EXACT)
    of_k, of_q = (half * chunk.before[..., None] for half in jnp.split(read, 2, axis=-2))
    d = jnp.matmul(chunk.solve, chunk.b[..., None] * (chunk.v - of_k), precision=_EXACT)
    y = of_q + jnp.matmul(chunk.mix, d, precision=_EXACT)
    added = jnp.einsum("bgjk,bgrjv->bgrkv", chunk.k, chunk.after[..., None] * d, precision=_EXACT)
    return state * chunk.before[..., -1, None, None] + added, y


def _split(x: Shaped[Array, "B T ..."], size: int, axis: int) -> Shaped[Array, "N B ..."]:
    """The chunks, zeros behind the last token; their tokens along this axis."""
    missing = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), (1, 2), (0, axis))


def _seen(segments: Int[Array, "B T"] | None, size: int) -> tuple[Bool[Array, "#N #B 1 1 C C"], Array]:
    """Which tokens of its chunk each token sees, and whether it sees the state before the chunk."""
    within = jnp.tril(jnp.ones((size, size), bool))[None, None]
    carried = jnp.ones((1, 1, size), bool)
    if segments is not None:
        chunks = _split(segments, size, -1)
        within = within & (chunks[..., :, None] == chunks[..., None, :])
        last = jnp.concatenate((chunks[:1, :, 0], chunks[:-1, :, -1]))  # before the first chunk the state is zeros
        carried = chunks == last[..., None]
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
