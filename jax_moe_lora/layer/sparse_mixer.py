"""SparseMixer, the router of Phi-3.5-MoE, as it is at inference (arXiv:2409.12136)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def sparse_mixer(
    scores: Float[Array, "T E"], jitter: float, chosen: Int[Array, "T 2"] | None = None
) -> tuple[Float[Array, "T 2"], Int[Array, "T 2"]]:
    """The two experts with the largest scores, each weighted by a softmax of its own.

    The first one's softmax is over the scores that are hardly smaller than the largest, the second one's likewise
    without the first. The weights are not divided by their sum: both may be near one. Training that draws experts at
    random, as the paper does, is left to the caller: these gradients are those of the two softmaxes.

    Args:
      scores: float32 `[T, E]`, the router's matmul.
      jitter: a score counts if it is smaller than the largest by at most `2 * jitter` of the larger of its own size
        and the largest score.
      chosen: int32 `[T, 2]`, experts that were chosen before, negative for a choice that is left to the router.

    Returns:
      `(weights float32 [T, 2], experts int32 [T, 2])`.
    """
    left, weights, experts = scores, [], []
    for place in range(2):
        largest = left.max(axis=-1, keepdims=True)
        size = jnp.maximum(jnp.abs(scores), largest)
        counts = ~((largest - scores) / size > 2 * jitter)  # 0 / 0 counts, where all scores are zero
        expert = jnp.argmax(left, axis=-1).astype(jnp.int32)
        if chosen is not None:
            given = chosen[:, place].astype(jnp.int32)
            expert = jnp.where(given < 0, expert, given)
        shares = jax.nn.softmax(jnp.where(counts, left, -jnp.inf), axis=-1)
        weights.append(jnp.take_along_axis(shares, expert[:, None], axis=-1)[:, 0])
        experts.append(expert)
        left = jnp.where(jnp.arange(scores.shape[-1])[None] == expert[:, None], -jnp.inf, left)
    return jnp.stack(weights, axis=-1), jnp.stack(experts, axis=-1)
