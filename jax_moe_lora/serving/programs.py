"""The two jitted programs of generation: the prompts in, and one more token of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.mesh.steps import on_all_devices, over_mesh
from jax_moe_lora.models import decoder
from jax_moe_lora.models.decoder import Cache, Routing
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.serving.kept_programs import kept
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
      experts: int32 `[B, T, L, K]`, the chosen experts of the tokens that were read, for L routed layers; None where
        nobody asked.
    """

    tokens: Int[Array, "B"]
    counts: TokenCounts | None = None
    scores: TokenScores | None = None
    experts: Int[Array, "B T L K"] | None = None


@partial(jax.jit, static_argnames=("config", "implementation", "mesh", "scored", "routed"), donate_argnames="cache")
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
    mesh: jax.sharding.Mesh | None = None,
    scored: bool = False,
    routed: bool = False,
) -> tuple[Cache, DrawnTokens]:
    """Prefill and the first token."""
    return kept(
        partial(_start, mesh=mesh),
        "start",
        (params, bank, cache, tokens, lengths, slots, sampling),
        mesh=mesh,
        config=config,
        implementation=implementation,
        scored=scored,
        routed=routed,
    )


def _start(params, bank, cache, tokens, lengths, slots, sampling, *, config, implementation, mesh, scored, routed):
    cache, logits, routing = over_mesh(decoder.prefill_routed, mesh)(
        params, bank, cache, tokens, lengths, slots, config=config, implementation=implementation, keep_routing=routed
    )
    counts = None if sampling.adjustments is None else count_prompts(tokens, lengths, logits.shape[-1])
    experts = _experts(routing, tokens.shape) if routed else None
    drawn = _draw(logits, sampling, jnp.zeros_like(lengths), counts, scored, experts)
    return cache, on_all_devices(drawn, mesh)


@partial(
    jax.jit,
    static_argnames=("config", "implementation", "mesh", "scored", "routed"),
    donate_argnames=("cache", "counts"),
)
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
    mesh: jax.sharding.Mesh | None = None,
    scored: bool = False,
    routed: bool = False,
) -> tuple[Cache, DrawnTokens]:
    """One decode step and the token after it, whose place in each answer is `index`."""
    return kept(
        partial(_advance, mesh=mesh),
        "advance",
        (params, bank, cache, tokens, slots, sampling, index, counts),
        mesh=mesh,
        config=config,
        implementation=implementation,
        scored=scored,
        routed=routed,
    )


def _advance(
    params, bank, cache, tokens, slots, sampling, index, counts, *, config, implementation, mesh, scored, routed
):
    cache, logits, routing = over_mesh(decoder.decode_routed, mesh)(
        params, bank, cache, tokens, slots, config=config, implementation=implementation, keep_routing=routed
    )
    experts = _experts(routing, (*tokens.shape, 1)) if routed else None
    return cache, on_all_devices(_draw(logits, sampling, index, counts, scored, experts), mesh)


def _experts(routing: Sequence[Routing], shape: tuple[int, ...]) -> Int[Array, "B T L K"]:
    experts = jnp.stack([layer.experts for layer in routing], axis=1)
    return experts.reshape(*shape, *experts.shape[1:])


def _draw(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    index: Int[Array, "B"],
    counts: TokenCounts | None,
    scored: bool,
    experts: Int[Array, "B T L K"] | None,
) -> DrawnTokens:
    tokens = sample(logits, sampling, index, counts)
    counts = None if counts is None else count_tokens(counts, tokens)
    return DrawnTokens(tokens, counts, score_tokens(logits, tokens) if scored else None, experts)
