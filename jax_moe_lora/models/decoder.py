"""A decoder-only transformer with routed experts, as pure functions over parameters, bank and cache.

Letters: B requests, T tokens of a request, M positions of the cache.
Layers are unrolled, not scanned (`benchmark/scan.py` has the measurement). `run_layer` is jitted on its own: all layers
of a kind share one trace, and XLA compiles their kernels once.
"""

from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.replacements import Replacements
from jax_moe_lora.layer.checks import check_array
from jax_moe_lora.models.blocks.cache_places import LayerCache
from jax_moe_lora.models.blocks.context import Bank, Routing, StepContext
from jax_moe_lora.models.blocks.norm import apply_norm
from jax_moe_lora.models.cache import Cache, check_width, init_cache
from jax_moe_lora.models.decoder_layer import run_layer
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.sites import adapter_sites, layer_sites
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.models.steps import make_step, packed_step, prompt_step
from jax_moe_lora.models.vocabulary import embed, head
from pallas_kernels.ops import BASE_SLOT, Implementation, LayerPages
from pallas_kernels.pages import NO_ADAPTERS

__all__ = [
    "Bank",
    "Cache",
    "Routing",
    "StepContext",
    "adapter_sites",
    "append",
    "decode",
    "decode_routed",
    "embed",
    "head",
    "hidden",
    "init_cache",
    "layer_sites",
    "logits",
    "packed_hidden",
    "packed_logits",
    "packed_step",
    "prefill",
    "prefill_routed",
    "prompt_step",
    "run_layer",
]


def logits(
    params: ModelParams,
    bank: Bank | None,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    chosen: Int[Array, "B T L K"] | None = None,
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
) -> Float[Array, "B T V"]:
    """Float32 logits at every position of right-padded prompts; those past a request's length are undefined.

    Args: as in `hidden`.
    """
    rows = hidden(params, bank, tokens, lengths, slots, chosen, config=config, implementation=implementation)
    return _logits(params, bank, rows, jnp.repeat(slots, tokens.shape[1]), config)


def hidden(
    params: ModelParams,
    bank: Bank | None,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    chosen: Int[Array, "B T L K"] | None = None,
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
) -> Float[Array, "B T D"]:
    """What the head reads at every position of right-padded prompts; rows past a request's length are undefined.

    Args:
      params: the weights.
      bank: the adapters.
      tokens: int32 `[B, T]`, right-padded.
      lengths: int32 `[B]`, real tokens of each.
      slots: int32 `[B]`, `BASE_SLOT` for the base model.
      chosen: int32 `[B, T, L, K]` for L routed layers, the experts of each token in place of those that the routers
        would choose; a router chooses where they are negative.
      config: the model's (static).
      implementation: a backend by name, or None for the best available (static).
    """
    step = prompt_step(tokens, lengths, slots, bank, implementation)
    return _layers(params, bank, tokens, step, None, config, chosen)[0]


def packed_logits(
    params: ModelParams,
    bank: Bank | None,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    slots: Int[Array, "B T"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
) -> Float[Array, "B T V"]:
    """Float32 logits at every position of rows that hold several examples each; those of padding mean nothing.

    Args: as in `packed_hidden`.
    """
    hidden, _ = packed_hidden(
        params, bank, tokens, positions, segments, slots, config=config, implementation=implementation
    )
    return _logits(params, bank, hidden, slots.reshape(-1), config)


def packed_hidden(
    params: ModelParams,
    bank: Bank | None,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    slots: Int[Array, "B T"],
    *,
    config: ModelConfig,
    packed: bool = True,
    keep_routing: bool = False,
    remat: bool = False,
    chosen: Int[Array, "B T L K"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Routing, ...]]:
    """What the head reads of rows that hold several examples each.

    Args:
      positions: int32 `[B, T]`, each token's place in its own example. segments: int32 `[B, T]`, 1 and up for the
        examples of a row, whose tokens lie side by side; 0 for padding, which costs nothing in the experts.
      slots: int32 `[B, T]`, each token's adapter, `BASE_SLOT` for the base model.
      packed: static. False says that each row holds one example, with its padding behind it: no mask is needed.
      keep_routing: static. Return what the routers decided too. remat: static. As in `moe_lora`.
      chosen: as in `hidden`.

    Returns:
      Hidden rows after the last norm, those of padding undefined; and what the router of each routed layer decided,
      where it was asked for.
    """
    check_array("tokens", tokens, ("B", "T"), "integers")
    for name, values in (("positions", positions), ("segments", segments), ("slots", slots)):
        check_array(name, values, tokens.shape, "integers")
    step = packed_step(positions, segments, slots, bank, implementation)
    step = replace(step, segments=step.segments if packed else None, keep_routing=keep_routing, remat=remat)
    hidden, _, routing = _layers(params, bank, tokens, step, None, config, chosen)
    return hidden, routing


def prefill(
    params: ModelParams,
    bank: Bank | None,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
) -> tuple[Cache, Float[Array, "B V"]]:
    """Reads right-padded prompts into an empty cache.

    Args:
      tokens: int32 `[B, T]`, T at most the cache's M. lengths: int32 `[B]`, real tokens of each prompt; a row of
        length 0 is unused and costs nothing in the experts. slots: int32 `[B]`, `BASE_SLOT` for the base model.

    Returns:
      The filled cache, and float32 `[B, V]` logits after each prompt's last token.
    """
    return prefill_routed(
        params, bank, cache, tokens, lengths, slots, config=config, implementation=implementation, keep_routing=False
    )[:2]


def prefill_routed(
    params: ModelParams,
    bank: Bank | None,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
    keep_routing: bool = True,
) -> tuple[Cache, Float[Array, "B V"], tuple[Routing, ...]]:
    """`prefill`, and what the router of each routed layer decided where `keep_routing`."""
    check_array("tokens", tokens, (cache.lengths.shape[0], "T"), "integers")
    check_width(tokens, cache)
    step = replace(prompt_step(tokens, lengths, slots, bank, implementation), keep_routing=keep_routing)
    hidden, layers, routing = _layers(params, bank, tokens, step, cache, config)
    cache = Cache(layers, lengths.astype(jnp.int32), cache.max_length)
    return cache, _last_logits(params, bank, hidden, lengths, slots, config), routing


def decode(
    params: ModelParams,
    bank: Bank | None,
    cache: Cache,
    tokens: Int[Array, "B"],
    slots: Int[Array, "B"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
) -> tuple[Cache, Float[Array, "B V"]]:
    """One more token of each request.

    Args:
      tokens: int32 `[B]`, the token at position `cache.lengths`. A row that is full (`lengths == M`) no longer writes:
        its logits mean nothing.

    Returns:
      The cache with the token in it, and float32 `[B, V]` logits of the next one.
    """
    return decode_routed(
        params, bank, cache, tokens, slots, config=config, implementation=implementation, keep_routing=False
    )[:2]


def decode_routed(
    params: ModelParams,
    bank: Bank | None,
    cache: Cache,
    tokens: Int[Array, "B"],
    slots: Int[Array, "B"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
    keep_routing: bool = True,
) -> tuple[Cache, Float[Array, "B V"], tuple[Routing, ...]]:
    """`decode`, and what the router of each routed layer decided where `keep_routing`."""
    rows = cache.lengths.shape
    check_array("tokens", tokens, rows, "integers")
    check_array("slots", slots, rows, "integers")
    live = cache.lengths > 0
    row_slots = jnp.where(live, slots, BASE_SLOT)
    positions, full = cache.lengths[:, None], cache.lengths >= cache.max_length
    step = make_step("token", positions, (live & ~full)[:, None], row_slots, bank, implementation, cache.lengths)
    step = replace(step, keep_routing=keep_routing)
    hidden, layers, routing = _layers(params, bank, tokens[:, None], step, cache, config)
    lengths = jnp.where(live, jnp.minimum(cache.lengths + 1, cache.max_length), 0)
    logits = _logits(params, bank, hidden, row_slots, config)[:, 0]
    return Cache(layers, lengths, cache.max_length), logits, routing


def append(
    params: ModelParams,
    bank: Bank | None,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
) -> tuple[Cache, Float[Array, "B V"]]:
    """Reads further tokens of each request into the cache, behind what it holds.

    Args:
      tokens: int32 `[B, T]`, right-padded. lengths: int32 `[B]`, real tokens of each; 0 leaves a row as it is, and
        tokens that it has no room for are dropped. slots: int32 `[B]`, `BASE_SLOT` for the base model.

    Returns:
      The cache, and float32 `[B, V]` logits after each row's last token.
    """
    check_array("tokens", tokens, (cache.lengths.shape[0], "T"), "integers")
    check_array("lengths", lengths, cache.lengths.shape, "integers")
    check_array("slots", slots, cache.lengths.shape, "integers")
    most, index = cache.max_length, jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    real = index < jnp.minimum(lengths, most - cache.lengths)[:, None]
    positions = jnp.where(real, cache.lengths[:, None] + index, most)
    row_slots = jnp.where(real, slots[:, None], BASE_SLOT).reshape(-1)
    step = make_step("chunk", positions, real, row_slots, bank, implementation, cache.lengths)
    hidden, layers, _ = _layers(params, bank, tokens, step, cache, config)
    held = jnp.minimum(cache.lengths + lengths, most).astype(jnp.int32)
    return Cache(layers, held, most), _last_logits(params, bank, hidden, lengths, slots, config)


def _layers(
    params: ModelParams,
    bank: Bank | None,
    tokens: Int[Array, "B T"],
    step: StepContext,
    cache: Cache | None,
    config: ModelConfig,
    chosen: Int[Array, "B T L K"] | None = None,
) -> tuple[Float[Array, "B T D"], tuple[LayerCache, ...], tuple[Routing, ...]]:
    """Embedding, all layers and the last norm; the cache's layers with the step's tokens; what the routers decided."""
    hidden = embed(params, _outer_adapters(bank, config), tokens, step.slots, config, _replacements(bank))
    given: dict[int, Array] = {}
    if chosen is not None:
        check_array("chosen", chosen, (*tokens.shape, len(config.routed_layers), config.moe.top_k), "integers")
        of_layers = chosen.reshape(-1, *chosen.shape[2:])
        given = {layer: of_layers[:, place] for place, layer in enumerate(config.routed_layers)}
    layers: list[LayerCache] = []
    decided: list[Routing] = []
    for index, (spec, layer) in enumerate(zip(config.layers, params.layers, strict=True)):
        adapters = None if bank is None else bank.layer(index)
        kept = None if cache is None else cache.layers[index]
        hidden, kept, routing = run_layer(spec, layer, adapters, hidden, step, kept, given.get(index))
        layers += [] if kept is None else [kept]
        decided += [] if routing is None else [routing]
    return apply_norm(config.norm, hidden, params.norm, params.norm_bias), tuple(layers), tuple(decided)


def _logits(
    params: ModelParams, bank: Bank | None, hidden: Float[Array, "B T D"], slots: Int[Array, "N"], config: ModelConfig
) -> Float[Array, "B T V"]:
    return head(params, hidden, config, _outer_adapters(bank, config), slots, _replacements(bank))


def _last_logits(
    params: ModelParams,
    bank: Bank | None,
    hidden: Float[Array, "B T D"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    config: ModelConfig,
) -> Float[Array, "B V"]:
    """The logits after each row's last token; a row without tokens is a base row."""
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    return _logits(params, bank, last, jnp.where(lengths > 0, slots, BASE_SLOT), config)[:, 0]


def _replacements(bank: Bank | None) -> Replacements | None:
    """Whole matrices in place of the model's embedding and head."""
    return None if bank is None else bank.replacements


def _outer_adapters(bank: Bank | None, config: ModelConfig) -> LayerPages:
    """The adapters of embedding and head, which stand behind the last layer's."""
    return NO_ADAPTERS if bank is None else bank.layer(config.num_layers)
