"""Sampling on the device: how each request of a batch picks its next token.

Every option is an array of the batch, so that another mix of options is the same program. A row that does not use an
option keeps its bits, whatever the other rows use. Letters: B requests, T tokens of a request, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jax_moe_lora.serving.sampling_params import MAX_LOGPROBS
from pallas_kernels.pytrees import pytree


@pytree
@dataclass(frozen=True)
class LogitAdjustments:
    """What changes logits before a token is drawn.

    Attributes:
      repetition: float32 `[B]`; 1 is off.
      presence: float32 `[B]`; 0 is off.
      frequency: float32 `[B]`; 0 is off.
      min_new_tokens: int32 `[B]`, tokens before which none of `stops` is drawn; 0 is off.
      stops: bool `[B, V]`, tokens that end the answer.
    """

    repetition: Float[Array, "B"]
    presence: Float[Array, "B"]
    frequency: Float[Array, "B"]
    min_new_tokens: Int[Array, "B"]
    stops: Bool[Array, "B V"]


@pytree
@dataclass(frozen=True)
class Sampling:
    """How each request of a batch picks its tokens.

    Attributes:
      temperature: float32 `[B]`; 0 takes the most probable token.
      top_k: int32 `[B]`, keep the k most probable tokens; 0 keeps all.
      top_p: float32 `[B]`, then keep the smallest set whose probability reaches p; 1 keeps all.
      min_p: float32 `[B]`, then keep tokens of at least this share of the highest probability; 0 keeps all.
      seed: uint32 `[B]`. A token's key follows from its request's seed and its place in the answer alone.
      adjustments: of the logits; None where no row of the batch asks for any.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    seed: UInt32[Array, "B"]
    adjustments: LogitAdjustments | None = None


@pytree
@dataclass(frozen=True)
class TokenCounts:
    """The tokens of each request so far, which penalties need.

    Attributes:
      prompt: bool `[B, V]`, whether a token is in the prompt.
      answer: int32 `[B, V]`, how often a token is in the answer.
    """

    prompt: Bool[Array, "B V"]
    answer: Int[Array, "B V"]


@pytree
@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of one position.

    Attributes:
      chosen: float32 `[B]`, of the token that was drawn.
      ids: int32 `[B, k]`, the most probable tokens, best first.
      values: float32 `[B, k]`, theirs.
    """

    chosen: Float[Array, "B"]
    ids: Int[Array, "B k"]
    values: Float[Array, "B k"]


def greedy(batch: int) -> Sampling:
    """The most probable token for each of `batch` requests."""
    zeros = jnp.zeros(batch)
    return Sampling(zeros, jnp.zeros(batch, jnp.int32), jnp.ones(batch), zeros, jnp.zeros(batch, jnp.uint32))


def sample(
    logits: Float[Array, "B V"], sampling: Sampling, index: Int[Array, "B"], counts: TokenCounts | None = None
) -> Int[Array, "B"]:
    """The next token of each request.

    Args:
      logits: float32 `[B, V]`.
      sampling: how to draw.
      index: int32 `[B]`, tokens that each request has generated before this one.
      counts: the tokens so far, where `sampling` has adjustments.

    Returns:
      int32 `[B]`.
    """
    if sampling.adjustments is not None and counts is not None:
        logits = adjust(logits, sampling.adjustments, counts, index)
    most_probable = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    some_draw = (sampling.temperature > 0).any()
    drawn = lax.cond(some_draw, _draw, lambda *_: most_probable, logits, sampling, index)
    return jnp.where(sampling.temperature > 0, drawn, most_probable)


def adjust(
    logits: Float[Array, "B V"], adjustments: LogitAdjustments, counts: TokenCounts, index: Int[Array, "B"]
) -> Float[Array, "B V"]:
    """Logits after the penalties, and without the tokens that may not end an answer yet.

    Args:
      logits: float32 `[B, V]`.
      adjustments: of each request.
      counts: the tokens so far.
      index: int32 `[B]`, tokens that each request has generated.

    Returns:
      float32 `[B, V]`. Rows that use no adjustment have the bits of `logits`.
    """
    repetition, presence, frequency = (
        column[:, None] for column in (adjustments.repetition, adjustments.presence, adjustments.frequency)
    )
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    adjusted = jnp.where(counts.prompt | (counts.answer > 0), repeated, logits)
    adjusted -= frequency * counts.answer.astype(logits.dtype)
    adjusted -= presence * (counts.answer > 0).astype(logits.dtype)
    used = (repetition != 1) | (presence != 0) | (frequency != 0)
    early = (index < adjustments.min_new_tokens)[:, None]
    return jnp.where(early & adjustments.stops, -jnp.inf, jnp.where(used, adjusted, logits))


def count_prompts(tokens: Int[Array, "B T"], lengths: Int[Array, "B"], vocabulary: int) -> TokenCounts:
    """Counts before the first token of an answer.

    Args:
      tokens: int32 `[B, T]`, right-padded prompts.
      lengths: int32 `[B]`, real tokens of each.
      vocabulary: V.
    """
    batch, width = tokens.shape
    places = jnp.where(jnp.arange(width)[None, :] < lengths[:, None], tokens, vocabulary)
    empty = jnp.zeros((batch, vocabulary), bool)
    prompt = empty.at[jnp.arange(batch)[:, None], places].set(True, mode="drop")
    return TokenCounts(prompt, jnp.zeros((batch, vocabulary), jnp.int32))


def count_tokens(counts: TokenCounts, tokens: Int[Array, "B"]) -> TokenCounts:
    """The counts with one more token of each answer."""
    return TokenCounts(counts.prompt, counts.answer.at[jnp.arange(tokens.shape[0]), tokens].add(1))


def score_tokens(logits: Float[Array, "B V"], tokens: Int[Array, "B"]) -> TokenScores:
    """Log-probabilities of tokens that were drawn, and the highest ones, of the logits as the model gave them."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    values, ids = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    return TokenScores(chosen, ids, values)


def _draw(logits: Float[Array, "B V"], sampling: Sampling, index: Int[Array, "B"]) -> Int[Array, "B"]:
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
    kept &= probability >= sampling.min_p[:, None] * probability[:, :1]
    ranked = jnp.where(kept, ranked, -jnp.inf)

    def choose(seed: Array, index: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), index), row)

    choice = jax.vmap(choose)(sampling.seed, index, ranked)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
