"""Gated delta-net (`specs/delta_net.py`): forward pass and cache.

Queries, keys and values go through a causal convolution over the last tokens, then through the rule of `delta_rule.py`.
The cache holds what the convolution saw last and the rule's state; padding changes neither.
Letters: B requests, T tokens of a request, K tokens of the convolution, W its width, G key heads, H value heads, dk and
dv widths of a key's and a value's head.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_moe_lora.models.blocks.cache_places import LayerCache
from jax_moe_lora.models.blocks.context import StepContext, linear, linears
from jax_moe_lora.models.blocks.delta_rule import Tokens, chunked, one_token
from jax_moe_lora.models.blocks.norm import norm_named
from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.specs.delta_net import DeltaNet
from pallas_kernels.ops import LayerPages

_UNIT_EPS = 1e-6  # in the length of queries and keys, whatever the norms' is


def init_cache(spec: DeltaNet, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> LayerCache:
    """An empty cache.

    Args:
      spec: the block's.
      batch: B.
      max_length: not needed: a request's cache is as large after a million tokens as after one.
      dtype: of `conv`.

    Returns:
      `conv` `[B, K - 1, W]`, what the convolution read last, and `state`, float32 `[B, H, dk, dv]`.
    """
    del max_length
    return {
        "conv": jnp.zeros((batch, spec.kernel - 1, spec.convolved), dtype),
        "state": jnp.zeros((batch, spec.num_heads, spec.key_dim, spec.value_dim), jnp.float32),
    }


def forward(
    spec: DeltaNet,
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
    qkv, z, b, a = _projections(spec, weights, adapters, x, step)
    # Padding may hold anything, and nothing times zero is zero.
    qkv, b, a = (jnp.where(step.row_mask[..., None], rows, 0) for rows in (qkv, b, a))
    before = _before(spec, x, step, cache)
    read = jnp.concatenate((before["conv"], qkv), axis=1)
    tokens = _tokens(spec, weights, _convolved(spec, weights["delta_conv"], read, step), b, a, step)
    state = before["state"].reshape(-1, spec.num_key_heads, spec.shared_by, spec.key_dim, spec.value_dim)
    if step.kind == "token":
        y, state = one_token(tokens, state)
    else:
        y, state = chunked(tokens, state, step.segments)
    y = y.reshape(*x.shape[:2], spec.num_heads, spec.value_dim).astype(x.dtype)
    y = norm_named(spec.norm, y, weights, "delta_norm").astype(jnp.float32) * jax.nn.silu(z.astype(jnp.float32))
    mixed = linear("delta_out", weights, adapters, y.astype(x.dtype).reshape(*x.shape[:2], spec.values), step)
    if cache is None:
        return mixed, None
    last = step.lengths[:, None] + jnp.arange(spec.kernel - 1, dtype=jnp.int32)[None]
    conv = jnp.take_along_axis(read, last[..., None], axis=1).astype(cache["conv"].dtype)
    return mixed, {"conv": conv, "state": state.reshape(cache["state"].shape)}


def _projections(
    spec: DeltaNet, weights: LayerParams, adapters: LayerPages, x: Float[Array, "B T D"], step: StepContext
) -> tuple[Float[Array, "B T W"], Float[Array, "B T H dv"], Float[Array, "B T H"], Float[Array, "B T H"]]:
    """What is convolved (queries, keys and values), the gate, and what steps and decays are made of."""
    shape, heads = x.shape[:2], (*x.shape[:2], spec.num_heads, spec.value_dim)
    if not spec.by_key_head:
        modules = "delta_qkv", "delta_z", "delta_b", "delta_a"
        qkv, z, b, a = linears(modules, weights, adapters, x, step)
        return qkv, z.reshape(heads), b, a
    of_heads = (*shape, spec.num_key_heads, -1)
    qkvz, ba = (y.reshape(of_heads) for y in linears(("delta_qkvz", "delta_ba"), weights, adapters, x, step))
    wide = spec.shared_by * spec.value_dim
    q, k, v, z = jnp.split(qkvz, (spec.key_dim, 2 * spec.key_dim, 2 * spec.key_dim + wide), axis=-1)
    qkv = jnp.concatenate([part.reshape(*shape, -1) for part in (q, k, v)], axis=-1)
    b, a = jnp.split(ba, 2, axis=-1)
    return qkv, z.reshape(heads), b.reshape(*shape, -1), a.reshape(*shape, -1)


def _before(spec: DeltaNet, x: Float[Array, "B T D"], step: StepContext, cache: LayerCache | None) -> LayerCache:
    """What came before the step: zeros for requests that begin with it, whatever their row held."""
    if cache is None or step.kind == "prompt":
        return init_cache(spec, x.shape[0], 0, x.dtype)
    begun = step.starts > 0
    conv, state = cache["conv"].astype(x.dtype), cache["state"]
    return {
        "conv": jnp.where(begun[:, None, None], conv, 0),
        "state": jnp.where(begun[:, None, None, None], state, 0),
    }


def _convolved(
    spec: DeltaNet, kernel: Float[Array, "W 1 K"], read: Float[Array, "B T_read W"], step: StepContext
) -> Float[Array, "B T W"]:
    """Each token's sum over itself and the tokens before it in its example, then SiLU; `T_read` is `K - 1 + T`."""
    count = read.shape[1] - spec.kernel + 1
    wide, segments = read.astype(jnp.float32), step.segments
    total = jnp.zeros((read.shape[0], count, read.shape[2]), jnp.float32)
    for tap in range(spec.kernel):
        rows = lax.slice_in_dim(wide, tap, tap + count, axis=1)
        back = spec.kernel - 1 - tap
        if segments is not None and back:
            earlier = jnp.pad(segments, ((0, 0), (back, 0)), constant_values=-1)[:, :count]
            rows = jnp.where((earlier == segments)[..., None], rows, 0)
        total += rows * kernel[:, 0, tap].astype(jnp.float32)[None, None]
    return jax.nn.silu(total).astype(read.dtype)


def _tokens(
    spec: DeltaNet,
    weights: LayerParams,
    qkv: Float[Array, "B T W"],
    b: Float[Array, "B T H"],
    a: Float[Array, "B T H"],
    step: StepContext,
) -> Tokens:
    """What the rule reads: queries and keys of length one, decays and steps, none of them at padding."""
    batch, count = qkv.shape[:2]
    q, k, v = jnp.split(qkv.astype(jnp.float32), (spec.keys, 2 * spec.keys), axis=-1)
    q, k = (_unit(rows.reshape(batch, count, spec.num_key_heads, spec.key_dim)) for rows in (q, k))
    v = v.reshape(batch, count, spec.num_key_heads, spec.shared_by, spec.value_dim)
    decay, offset = (weights[name].astype(jnp.float32)[None, None] for name in ("delta_decay", "delta_step"))
    g = -jnp.exp(decay) * jax.nn.softplus(a.astype(jnp.float32) + offset)
    real, heads = step.row_mask[..., None], v.shape[:-1]
    b = jax.nn.sigmoid(b).astype(jnp.float32)
    g, b = (jnp.where(real, rows, 0).reshape(heads) for rows in (g, b))
    return Tokens(q * spec.key_dim**-0.5, k, v, g, b)


def _unit(x: Float[Array, "... dk"]) -> Float[Array, "... dk"]:
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _UNIT_EPS)
