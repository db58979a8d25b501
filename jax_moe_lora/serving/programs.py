"""The two jitted programs of generation: the prompts in, and one more token of each."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.models import decoder
from jax_moe_lora.models.decoder import Cache
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.serving.sampling import (
    Sampling,
    TokenCounts,
    TokenScores,
    count_prompts,
    count_tokens,
    sample,
    score_tokens,
)
from pallas_kernels.ops import Implementation
from pallas_kernels.pytrees import pytree


@pytree
@dataclass(frozen=True)
class DrawnTokens:
    """What one step gives beside the cache.

    Attributes:
      tokens: int32 `[B]`, the next token of each request.
      counts: with these tokens in them; None where nothing needs them.
      scores: log-probabilities; None where nobody asked.
    """

    tokens: Int[Array, "B"]
    counts: TokenCounts | None = None
    scores: TokenScores | None = None


@partial(jax.jit, static_argnames=("config", "implementation", "scored"), donate_argnames="cache")
def start(
    params: ModelParams,
    bank: AdapterBank,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    sampling: Sampling,
    config: ModelConfig,
    implementation: Implementation | None,
    scored: bool = False,
) -> tuple[Cache, DrawnTokens]:
    """Prefill and the first token."""
    cache, logits = decoder.prefill(
        params, bank, cache, tokens, lengths, slots, config=config, implementation=implementation
    )
    counts = None if sampling.adjustments is None else count_prompts(tokens, lengths, logits.shape[-1])
    return cache, _draw(logits, sampling, jnp.zeros_like(lengths), counts, scored)


@partial(jax.jit, static_argnames=("config", "implementation", "scored"), donate_argnames=("cache", "counts"))
def advance(
    params: ModelParams,
    bank: AdapterBank,
    cache: Cache,
    tokens: Int[Array, "B"],
    slots: Int[Array, "B"],
    sampling: Sampling,
    index: Int[Array, "B"],
    counts: TokenCounts | None,
    config: ModelConfig,
    implementation: Implementation | None,
    scored: bool = False,
) -> tuple[Cache, DrawnTokens]:
    """One decode step and the token after it, whose place in each answer is `index`."""
    cache, logits = decoder.decode(params, bank, cache, tokens, slots, config=config, implementation=implementation)
    return cache, _draw(logits, sampling, index, counts, scored)


def _draw(
    logits: Float[Array, "B V"], sampling: Sampling, index: Int[Array, "B"], counts: TokenCounts | None, scored: bool
) -> DrawnTokens:
    tokens = sample(logits, sampling, index, counts)
    counts = None if counts is None else count_tokens(counts, tokens)
    return DrawnTokens(tokens, counts, score_tokens(logits, tokens) if scored else None)
