"""Attention over a prompt and over a cache, through the best kernel that jax ships, and which one that is.

Inference takes no mask: a causal `[T, T]` of 8192 tokens would be the largest array of a prefill, and cuDNN's flash
kernels skip what lengths and causality leave out. Rows of several examples need one, `[B, 1, T, T]`, which cuDNN adds
as a bias: the logits of the heads are still never written. No row is ever without a key, so no softmax is over nothing.
Letters: B requests, T tokens of a request, M positions of the cache, H query heads, G key/value heads, hd head width.
"""

from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.backend import Choice, backend_named, default_device
from pallas_kernels.ops import Implementation
from pallas_kernels.varying import varying_as

AttentionBackend = Literal["cudnn", "xla"]
MIN_CAPABILITY = 8.0  # of cuDNN's flash attention


def choose_attention(
    implementation: Implementation | None = None,
    *,
    dtype: jax.typing.DTypeLike,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Choice[AttentionBackend]:
    """Picks the attention backend: cuDNN where it runs the call, else XLA. Never raises.

    Args:
      implementation: the backend that was asked for in the grouped ops; "xla" and "reference" keep attention with XLA
        too, so that a whole model runs without a hand-written kernel.
      dtype: of queries, keys and values.
      num_heads: H.
      num_kv_heads: G.
      head_dim: hd.
    """
    why = _why_not_cudnn(implementation, jnp.dtype(dtype), num_heads, num_kv_heads, head_dim)
    return Choice("xla", {"cudnn": why}) if why else Choice("cudnn", {"xla": "cuDNN runs this call"})


def attend_prompt(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T G hd"],
    v: Float[Array, "B T G hd"],
    backend: AttentionBackend,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H hd"]:
    """Causal attention of right-padded prompts to themselves, in q's dtype.

    Lengths are not needed: a real token only looks back, at real tokens. Rows past a prompt's end are finite and
    undefined.

    Args:
      q: queries.
      k: keys.
      v: values.
      backend: what runs it.
      scale: factor on the scores; None for `hd ** -0.5`.
      window: a token sees itself and the `window - 1` tokens before it; None for all of them.
      sinks: a logit per head that takes part in the softmax and has no value.
    """
    if window is not None and window >= q.shape[1]:
        window = None
    local = None if window is None else (window - 1, 0)
    return _attend(q, k, v, sinks, backend=backend, scale=scale, is_causal=True, local_window_size=local)


def attend_packed(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T G hd"],
    v: Float[Array, "B T G hd"],
    segments: Int[Array, "B T"],
    backend: AttentionBackend,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H hd"]:
    """Causal attention within each example of rows that hold several, in q's dtype.

    Args:
      q: queries.
      k: keys.
      v: values.
      segments: int32 `[B, T]`, the example that a token belongs to. Padding is one of them: its rows look at nothing
        else, are finite and undefined.
      backend: what runs it.
      scale: as in `attend_prompt`.
      window: as in `attend_prompt`; an example's tokens lie side by side.
      sinks: as in `attend_prompt`.
    """
    if q.shape[1] % 2:
        backend = "xla"  # cuDNN has no gradients for a bias of odd length
    mask = segments[:, None, :, None] == segments[:, None, None, :]
    if window is not None:
        index = jnp.arange(q.shape[1])
        mask &= (index[:, None] - index[None, :] < window)[None, None]
    return _attend(q, k, v, sinks, mask=mask, backend=backend, scale=scale, is_causal=True)


def attend_cache(
    q: Float[Array, "B 1 H hd"],
    keys: Float[Array, "B M G hd"],
    values: Float[Array, "B M G hd"],
    lengths: Int[Array, "B"],
    backend: AttentionBackend,
    *,
    scale: float | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B 1 H hd"]:
    """Attention of one token of each request to the first `lengths` positions of its cache, in q's dtype.

    Args:
      q: queries.
      keys: the cache's.
      values: the cache's.
      lengths: int32 `[B]`, 1 to M. What lies behind must be finite: it is multiplied by zero.
      backend: what runs it.
      scale: as in `attend_prompt`.
      sinks: as in `attend_prompt`.
    """
    ones = None if backend == "xla" else jnp.ones_like(lengths)
    return _attend(q, keys, values, sinks, ones, lengths, backend=backend, scale=scale)


def attend_masked(
    q: Float[Array, "B T H hd"],
    keys: Float[Array, "B M G hd"],
    values: Float[Array, "B M G hd"],
    seen: Bool[Array, "B T M"],
    backend: AttentionBackend,
    *,
    scale: float | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H hd"]:
    """Attention of some tokens of each request to what a mask lets them see, in q's dtype.

    Args:
      q: queries.
      keys: those of the cache, and of the tokens themselves.
      values: likewise.
      seen: the keys that each token sees, one at least. The others must be finite.
      backend: what runs it.
      scale: as in `attend_prompt`.
      sinks: as in `attend_prompt`.
    """
    return _attend(q, keys, values, sinks, mask=seen[:, None], backend=backend, scale=scale)


def _attend(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None,
    query_lengths: Array | None = None,
    key_lengths: Array | None = None,
    mask: Array | None = None,
    **static: Any,
) -> Array:
    if sinks is None:
        return _softmax_attend(q, k, v, mask, query_lengths, key_lengths, return_residual=False, **static)
    operands = varying_as((q, k, v, sinks, mask, query_lengths, key_lengths))
    return _sink_attend(tuple(sorted(static.items())), *operands)


def _with_sinks(static, q, k, v, sinks, mask, query_lengths, key_lengths) -> tuple[Array, Array]:
    """The result, and the logsumexp of the scores without sinks.

    Each head's sink s takes part in the softmax: the result without it, times `sigmoid(logsumexp - s)`.
    """
    y, total = _softmax_attend(q, k, v, mask, query_lengths, key_lengths, return_residual=True, **dict(static))
    total = total.astype(jnp.float32)
    share = jax.nn.sigmoid(total - sinks.astype(jnp.float32)[None, None])
    return (y.astype(jnp.float32) * share[..., None]).astype(q.dtype), total


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sink_attend(static, *operands) -> Array:
    return _with_sinks(static, *operands)[0]


def _sink_forward(static, *operands):
    y, total = _with_sinks(static, *operands)
    return y, (operands, total)


def _sink_backward(static, saved, dy):
    """The share of what is no sink depends on the scores too, through the logsumexp, for which jax has no gradient.

    With p the softmax without sinks and t the logsumexp's cotangent, q's further gradient is `scale * t * (p @ k)`, and
    that of k is what `p @ v` gives v for the cotangent `scale * t * q`.
    """
    (q, k, v, sinks, *masks), total = saved
    options = dict(static)
    scale = q.shape[-1] ** -0.5 if options["scale"] is None else options["scale"]

    def attend(q, k, v):
        return _softmax_attend(q, k, v, *masks, return_residual=False, **options)

    y, pullback = jax.vjp(attend, q, k, v)
    share, wide = jax.nn.sigmoid(total - sinks.astype(jnp.float32)[None, None]), dy.astype(jnp.float32)
    dq, dk, dv = pullback((wide * share[..., None]).astype(dy.dtype))
    dtotal = (wide * y.astype(jnp.float32)).sum(axis=-1) * share * (1 - share)
    mean_key, to_keys = jax.vjp(lambda keys: attend(q, k, keys), k)
    factor = scale * dtotal[..., None]
    (more_dk,) = to_keys((factor * q.astype(jnp.float32)).astype(q.dtype))
    dq = (dq.astype(jnp.float32) + factor * mean_key.astype(jnp.float32)).astype(q.dtype)
    dsinks = -dtotal.sum(axis=(0, 1)).astype(sinks.dtype)
    return dq, dk + more_dk, dv, dsinks, None, None, None


_sink_attend.defvjp(_sink_forward, _sink_backward)


def _softmax_attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
    *,
    backend: AttentionBackend,
    return_residual: bool,
    **options: Any,
) -> Any:
    """The result, and where asked for the logsumexp `[B, T, H]` of the scores."""
    if backend == "xla" and q.dtype != jnp.float32:
        # jax 0.11.2: XLA cannot compile the float16 product for a GPU where a prompt has one token, and the gradient
        # of the bfloat16 one mixes dtypes where it is compiled, which a caller's strict promotion would refuse.
        wide_q, wide_k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
        y = _softmax_attend(
            wide_q,
            wide_k,
            wide_v,
            mask,
            query_lengths,
            key_lengths,
            backend=backend,
            return_residual=return_residual,
            **options,
        )
        return (y[0].astype(q.dtype), y[1]) if return_residual else y.astype(q.dtype)
    options |= {"query_seq_lengths": query_lengths, "key_value_seq_lengths": key_lengths}
    attend: Any = jax.nn.dot_product_attention  # its overloads tell apart what is static here
    precision = "highest" if q.dtype == jnp.float32 else "default"
    # jax's own function multiplies bfloat16 by a float32 scale, which a caller's strict promotion would refuse.
    with jax.default_matmul_precision(precision), jax.numpy_dtype_promotion("standard"):
        return attend(q, k, v, mask=mask, implementation=backend, return_residual=return_residual, **options)


def _why_not_cudnn(
    implementation: Implementation | None, dtype: jnp.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> str:
    """Empty where cuDNN can run the call."""
    if implementation is not None and not backend_named(implementation).kernels:
        return f"implementation={implementation!r} was asked for"
    device = default_device()
    capability = getattr(device, "compute_capability", None)
    if device.platform not in ("gpu", "cuda") or capability is None:
        return f"it needs an NVIDIA GPU, this is {device.platform}"
    try:
        new_enough = float(capability) >= MIN_CAPABILITY
    except ValueError:  # AMD's are names
        new_enough = False
    if not new_enough:
        return f"it needs compute capability {MIN_CAPABILITY}, this is {capability}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it multiplies bfloat16 and float16, these are {dtype}"
    return _probe(dtype, num_heads, num_kv_heads, head_dim)


@lru_cache
def _probe(dtype: jnp.dtype, num_heads: int, num_kv_heads: int, head_dim: int) -> str:
    """What jax says when it traces the call: the limits on heads and versions are its own, and change with it."""
    q = jax.ShapeDtypeStruct((1, 1, num_heads, head_dim), dtype)
    kv = jax.ShapeDtypeStruct((1, 8, num_kv_heads, head_dim), dtype)
    try:
        jax.eval_shape(partial(attend_cache, backend="cudnn"), q, kv, kv, jax.ShapeDtypeStruct((1,), jnp.int32))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return str(error)
    return ""
