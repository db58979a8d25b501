"""Grouped-query attention (`specs/gqa.py`): forward pass and cache.

The cache of a layer with a window is a ring: position p stands in place `p % W`, and a token sees all of it.
Letters: B requests, T tokens of a request, M positions of the cache (W of a ring), H query heads, G key/value heads,
hd head width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jax_moe_lora.models.blocks.attention import (
    AttentionBackend,
    attend_cache,
    attend_masked,
    attend_packed,
    attend_prompt,
    choose_attention,
)
from jax_moe_lora.models.blocks.cache_places import LayerCache, places_in_ring, ring_positions, store, store_ring
from jax_moe_lora.models.blocks.context import StepContext, float32_linears, linear
from jax_moe_lora.models.blocks.norm import norm_named
from jax_moe_lora.models.blocks.partial_sums import total
from jax_moe_lora.models.blocks.token_heads import in_one_kernel, token_heads
from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.rope import rotate
from jax_moe_lora.models.specs.gqa import GQA
from pallas_kernels.ops import LayerPages


def init_cache(spec: GQA, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> LayerCache:
    """An empty cache.

    Args:
      spec: the block's.
      batch: B.
      max_length: M.
      dtype: of keys and values.

    Returns:
      `k` and `v`, `[B, M, G, hd]`, or `[B, W, G, hd]` where the window W is less than M.
    """
    places = max_length if spec.window is None else min(spec.window, max_length)
    shape = (batch, places, spec.num_kv_heads, spec.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def forward(
    spec: GQA,
    weights: LayerParams,
    adapters: LayerPages,
    x: Float[Array, "B T D"],
    step: StepContext,
    cache: LayerCache | None,
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """Mixes the tokens of each request.

    Args:
      spec: the block's.
      weights: the layer's arrays.
      adapters: the layer's pages.
      x: `[B, T, D]`.
      step: what every layer reads.
      cache: the layer's, or None to keep none.

    Returns:
      `[B, T, D]`, and the cache with the step's tokens in it.
    """
    rows, gate = float32_linears("qkv", weights, adapters, x, step), None
    if cache is not None and in_one_kernel(spec, rows, x.dtype, cache, step):
        place = places_in_ring(step, cache["k"].shape[1]) if _is_ring(spec, cache) else step.positions
        q, cache = token_heads(spec, weights, rows, place[:, 0], cache, step)
        mixed = _attend_token(spec, q, weights.get("sinks"), step, cache)
    else:
        q, k, v = (row.reshape(*x.shape[:2], -1).astype(x.dtype) for row in rows)
        q, gate = _queries(spec, weights, q, step)
        k = split_heads(spec, "k", weights, k, step)
        v = _clip(spec, v).reshape(k.shape)
        mixed, cache = attend(spec, q, k, v, weights.get("sinks"), step, cache)
    mixed = mixed.reshape(*x.shape[:2], -1)
    if spec.gate == "projection":
        gate = linear("attention_gate", weights, adapters, x, step)
    if gate is not None:
        mixed = mixed * jax.nn.sigmoid(gate)
    return total(linear("o", weights, adapters, mixed, step)), cache


def attend(
    spec: GQA,
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T G hd"],
    v: Float[Array, "B T G hd"],
    sinks: Float[Array, "H"] | None,
    step: StepContext,
    cache: LayerCache | None,
) -> tuple[Float[Array, "B T H hd"], LayerCache | None]:
    """Attention of a step's tokens to the cache and to themselves.

    Args:
      spec: scale, window and sizes.
      q: queries, turned.
      k: keys, turned.
      v: values.
      sinks: a logit per head, or None.
      step: what every layer reads.
      cache: the layer's, or None to keep none.

    Returns:
      The mixed values, and the cache with the step's tokens in it.
    """
    backend, options = _backend(q, k, step), _options(spec, sinks)
    if step.segments is not None:
        return attend_packed(q, k, v, step.segments, backend, window=spec.window, **options), None
    if step.kind == "prompt":
        mixed = attend_prompt(q, k, v, backend, window=spec.window, **options)
        return mixed, None if cache is None else _stored(spec, cache, k, v, step)
    assert cache is not None
    if step.kind == "token":
        cache = _stored(spec, cache, k, v, step)
        return _attend_token(spec, q, sinks, step, cache), cache
    if _is_ring(spec, cache):  # what the chunk overwrites is seen by its first tokens
        keys, values = (jnp.concatenate((cache[side], new), axis=1) for side, new in (("k", k), ("v", v)))
        mixed = attend_masked(q, keys, values, _seen_of_ring(spec, cache, step), backend, **options)
        return mixed, _stored(spec, cache, k, v, step)
    cache = _stored(spec, cache, k, v, step)
    last = jnp.where(step.row_mask, step.positions, 0)
    seen = jnp.arange(cache["k"].shape[1])[None, None, :] <= last[:, :, None]
    return attend_masked(q, cache["k"], cache["v"], seen, backend, **options), cache


def _attend_token(
    spec: GQA, q: Float[Array, "B 1 H hd"], sinks: Float[Array, "H"] | None, step: StepContext, cache: LayerCache
) -> Float[Array, "B 1 H hd"]:
    """Attention of a token of each request to its cache, which holds its own key and value already."""
    backend = _backend(q, cache["k"], step)
    in_use = jnp.minimum(step.starts + 1, cache["k"].shape[1])
    return attend_cache(q, cache["k"], cache["v"], in_use, backend, **_options(spec, sinks))


def _backend(q: Array, k: Array, step: StepContext) -> AttentionBackend:
    heads = {"num_heads": q.shape[2], "num_kv_heads": k.shape[2], "head_dim": q.shape[3]}
    return choose_attention(step.implementation, dtype=q.dtype, **heads).picked


def _options(spec: GQA, sinks: Float[Array, "H"] | None) -> dict[str, Any]:
    return {"scale": spec.scale, "sinks": sinks}


def _is_ring(spec: GQA, cache: LayerCache) -> bool:
    return spec.window is not None and cache["k"].shape[1] == spec.window


def _stored(spec: GQA, cache: LayerCache, k: Array, v: Array, step: StepContext) -> LayerCache:
    new: Mapping[str, Array] = {"k": k, "v": v}
    if _is_ring(spec, cache):
        return {side: store_ring(cache[side], new[side], step) for side in new}
    return {side: store(cache[side], new[side], step) for side in new}


def _seen_of_ring(spec: GQA, cache: LayerCache, step: StepContext) -> Bool[Array, "B T places"]:
    """What the tokens of a chunk see of the ring as it was, and of each other. Padding sees everything."""
    assert spec.window is not None
    before = ring_positions(step.starts, cache["k"].shape[1])
    index = jnp.arange(step.positions.shape[1], dtype=jnp.int32)[None, :]
    positions = jnp.concatenate((before, step.starts[:, None] + index), axis=1)[:, None, :]
    there = jnp.concatenate((before >= 0, step.row_mask), axis=1)[:, None, :]
    own = (step.starts[:, None] + index)[:, :, None]
    seen = there & (positions <= own) & (own - positions < spec.window)
    return seen | ~step.row_mask[:, :, None]


def _queries(
    spec: GQA, weights: LayerParams, y: Float[Array, "B T width"], step: StepContext
) -> tuple[Float[Array, "B T H hd"], Array | None]:
    """The queries, and what each head's second half says of the gate where q holds both."""
    if spec.gate != "q":
        return split_heads(spec, "q", weights, y, step), None
    y, gate = jnp.split(y.reshape(*y.shape[:2], -1, 2 * spec.head_dim), 2, axis=-1)
    y, gate = (half.reshape(*y.shape[:2], -1) for half in (y, gate))
    return split_heads(spec, "q", weights, y, step), gate


def split_heads(
    spec: GQA, module: str, weights: LayerParams, y: Float[Array, "B T width"], step: StepContext
) -> Float[Array, "B T heads hd"]:
    """A projection's heads: normed, clipped and turned.

    Args:
      spec: norms, clipping and rotary embedding.
      module: `q` or `k`, whose norm it is.
      weights: the layer's arrays.
      y: the projection's rows.
      step: what every layer reads.
    """
    shape = (*y.shape[:2], y.shape[2] // spec.head_dim, spec.head_dim)

    def normed(y: Array) -> Array:
        if spec.qk_norm == "head":
            y = y.reshape(shape)
        return norm_named(spec.norm, y, weights, f"{module}_norm").reshape(shape) if spec.qk_norm else y.reshape(shape)

    y = y.reshape(shape) if spec.qk_norm_last else normed(y)
    y = _clip(spec, y)
    if spec.rope is not None:
        y = rotate(y, step.positions, spec.rope)
    return normed(y) if spec.qk_norm_last else y


def _clip(spec: GQA, y: Array) -> Array:
    return y if spec.clip is None else jnp.clip(y, -spec.clip, spec.clip)
