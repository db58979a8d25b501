"""Sampling: how each request of a batch picks its next token."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.pytrees import pytree


@pytree
@dataclass(frozen=True)
class Sampling:
    """How each request of a batch picks its tokens.

    Attributes:
      temperature: float32 `[B]`; 0 takes the most probable token.
      top_k: int32 `[B]`, keep the k most probable tokens; 0 keeps all.
      top_p: float32 `[B]`, then keep the smallest set whose probability reaches p; 1 keeps all.
      seed: uint32 `[B]`. A request's tokens depend on its own seed and logits, not on its neighbours.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    seed: UInt32[Array, "B"]


def sample(logits: Float[Array, "B V"], sampling: Sampling, index: Int[Array, ""]) -> Int[Array, "B"]:
    """The next token of each request; `index` counts the tokens generated before it."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = lax.cond((sampling.temperature > 0).any(), _draw, lambda *_: greedy, logits, sampling, index)
    return jnp.where(sampling.temperature > 0, drawn, greedy)


def _draw(logits: Float[Array, "B V"], sampling: Sampling, index: Int[Array, ""]) -> Int[Array, "B"]:
    vocabulary = logits.shape[-1]
    scaled = logits / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(vocabulary)[None, :]
    kept = (rank < sampling.top_k[:, None]) | (sampling.top_k[:, None] <= 0)
    # As transformers does: top-p looks at what top-k left, and the token that crosses p stays.
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    kept &= (before < sampling.top_p[:, None]) | (rank == 0)
    ranked = jnp.where(kept, ranked, -jnp.inf)

    def choose(seed: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), index), row)

    choice = jax.vmap(choose)(sampling.seed, ranked)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
