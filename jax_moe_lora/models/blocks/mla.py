"""Multi-head latent attention (`specs/mla.py`): forward pass and cache.

The cache holds a token's latent and its one turned key, whatever the number of heads. A prompt makes keys and values of
its latents and attends as others do. What attends to the cache works on the latents themselves: the matrices that
would make keys and values are absorbed into the queries and into the result (`absorbed.py`).
Letters: B requests, T tokens of a request, M positions of the cache, H heads, C width of the latent; n, r and v are the
widths of a head's parts without position, with position, and of its values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_moe_lora.models.blocks.absorbed import attend_latents, from_latents, kv_b_adapters, to_latents
from jax_moe_lora.models.blocks.attention import attend_packed, attend_prompt, choose_attention
from jax_moe_lora.models.blocks.cache_places import LayerCache, store
from jax_moe_lora.models.blocks.context import StepContext, linear, linears
from jax_moe_lora.models.blocks.norm import norm_named
from jax_moe_lora.models.blocks.partial_sums import total
from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.rope import rotate
from jax_moe_lora.models.specs.mla import MLA
from pallas_kernels.ops import LayerPages
from pallas_kernels.quantised.api import dense


def init_cache(spec: MLA, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> LayerCache:
    """An empty cache.

    Args:
      spec: the block's.
      batch: B.
      max_length: M.
      dtype: of latents and keys.

    Returns:
      `latent` `[B, M, C]` and `rope_key` `[B, M, r]`.
    """
    widths = {"latent": spec.kv_rank, "rope_key": spec.rope_dim}
    return {name: jnp.zeros((batch, max_length, width), dtype) for name, width in widths.items()}


def forward(
    spec: MLA,
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
    first = "q" if spec.q_rank is None else "q_a"
    q, compressed = linears((first, "kv_a_with_mqa"), weights, adapters, x, step)
    q, turned_q = _queries(spec, weights, adapters, q, step)
    latent, key = jnp.split(compressed, [spec.kv_rank], axis=-1)
    latent = norm_named(spec.norm, latent, weights, "kv_a_norm")
    key = _turned(spec, key[:, :, None], step)[:, :, 0]
    if cache is not None:
        cache = {"latent": store(cache["latent"], latent, step), "rope_key": store(cache["rope_key"], key, step)}
    if step.kind == "prompt":
        mixed = _attend_expanded(spec, weights, adapters, (q, turned_q), latent, key, step)
    else:
        assert cache is not None
        mixed = _attend_absorbed(spec, weights, adapters, (q, turned_q), cache, step)
    return total(linear("o", weights, adapters, mixed.reshape(*x.shape[:2], -1), step)), cache


def _queries(
    spec: MLA, weights: LayerParams, adapters: LayerPages, q: Float[Array, "B T width"], step: StepContext
) -> tuple[Float[Array, "B T H n"], Float[Array, "B T H r"]]:
    """The two parts of each head's query, the second one turned; from the projection q, or q_a where there are two."""
    if spec.q_rank is not None:
        q = linear("q_b", weights, adapters, norm_named(spec.norm, q, weights, "q_a_norm"), step)
    q = q.reshape(*q.shape[:2], -1, spec.nope_dim + spec.rope_dim)
    plain, turned = jnp.split(q, [spec.nope_dim], axis=-1)
    turned = _turned(spec, turned, step)
    if spec.query_growth is None:
        return plain, turned
    beta, length = spec.query_growth
    growth = 1.0 + beta * jnp.log1p((step.positions // length).astype(jnp.float32))
    growth = growth.astype(q.dtype)[:, :, None, None]
    return plain * growth, turned * growth


def _turned(spec: MLA, x: Float[Array, "B T H r"], step: StepContext) -> Float[Array, "B T H r"]:
    """By the rotary embedding. Neighbours come apart into halves, in queries and keys alike: scores stay the same."""
    if spec.interleaved:
        x = jnp.concatenate((x[..., 0::2], x[..., 1::2]), axis=-1)
    return rotate(x, step.positions, spec.rope)


def _scale(spec: MLA) -> float:
    return (spec.nope_dim + spec.rope_dim) ** -0.5 if spec.scale is None else spec.scale


def _attend_expanded(
    spec: MLA,
    weights: LayerParams,
    adapters: LayerPages,
    queries: tuple[Float[Array, "B T H n"], Float[Array, "B T H r"]],
    latent: Float[Array, "B T C"],
    key: Float[Array, "B T r"],
    step: StepContext,
) -> Float[Array, "B T H v"]:
    """Attention of prompts to themselves, with keys and values for each head."""
    expanded = linear("kv_b", weights, adapters, latent, step)
    expanded = expanded.reshape(*latent.shape[:2], -1, spec.nope_dim + spec.value_dim)
    plain_k, v = jnp.split(expanded, [spec.nope_dim], axis=-1)
    shared = jnp.broadcast_to(key[:, :, None], (*plain_k.shape[:3], spec.rope_dim))
    q, k = jnp.concatenate(queries, axis=-1), jnp.concatenate((plain_k, shared), axis=-1)
    # Kernels want one width for all three; zeros add nothing to scores, and are cut off values.
    width = max(spec.nope_dim + spec.rope_dim, spec.value_dim)
    q, k, v = (jnp.pad(part, [(0, 0)] * 3 + [(0, width - part.shape[-1])]) for part in (q, k, v))
    heads = {"num_heads": q.shape[2], "num_kv_heads": q.shape[2], "head_dim": width}
    backend = choose_attention(step.implementation, dtype=q.dtype, **heads).picked
    if step.segments is None:
        mixed = attend_prompt(q, k, v, backend, scale=_scale(spec))
    else:
        mixed = attend_packed(q, k, v, step.segments, backend, scale=_scale(spec))
    return mixed[..., : spec.value_dim]


def _attend_absorbed(
    spec: MLA,
    weights: LayerParams,
    adapters: LayerPages,
    queries: tuple[Float[Array, "B T H n"], Float[Array, "B T H r"]],
    cache: LayerCache,
    step: StepContext,
) -> Float[Array, "B T H v"]:
    """Attention to the latents of the cache, which hold the step's own tokens already."""
    q, turned_q = queries
    # One layer's in 16 bits for as long as the step needs it: the einsums below take it head by head.
    kv_b = dense(weights["kv_b"], q.dtype).reshape(-1, spec.nope_dim + spec.value_dim, spec.kv_rank)
    to_key, to_value = jnp.split(kv_b, [spec.nope_dim], axis=1)
    # All tokens of a request have its slot, but for padding.
    slots = step.slots.reshape(q.shape[:2]).max(axis=1)
    key_pages, value_pages = kv_b_adapters(adapters.get("kv_b"), slots, q.shape[2], spec.nope_dim, q.dtype)
    last = jnp.where(step.row_mask, step.positions, 0)
    seen = jnp.arange(cache["latent"].shape[1])[None, None, :] <= last[:, :, None]
    latent_q = to_latents(q, to_key, key_pages)
    mixed = attend_latents(latent_q, turned_q, cache["latent"], cache["rope_key"], seen, _scale(spec))
    return from_latents(mixed, to_value, value_pages)
