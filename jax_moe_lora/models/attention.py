"""Attention over a prompt and over a cache, through the best kernel that jax ships, and which one that is.

Inference takes no mask: a causal `[T, T]` of 8192 tokens would be the largest array of a prefill, and cuDNN's flash
kernels skip what lengths and causality leave out. Rows of several examples need one, `[B, 1, T, T]`, which cuDNN adds
as a bias: the logits of the heads are still never written. No row is ever without a key, so no softmax is over nothing.
Letters: B requests, T tokens of a request, M positions of the cache, H query heads, G key/value heads, hd head width.
"""

from functools import lru_cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Choice, backend_named, default_device
from pallas_kernels.ops import Implementation

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
    q: Float[Array, "B T H hd"], k: Float[Array, "B T G hd"], v: Float[Array, "B T G hd"], backend: AttentionBackend
) -> Float[Array, "B T H hd"]:
    """Causal attention of right-padded prompts to themselves, in q's dtype.

    Lengths are not needed: a real token only looks back, at real tokens. Rows past a prompt's end are finite and mean
    nothing.
    """
    return _attend(q, k, v, backend, is_causal=True)


def attend_packed(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T G hd"],
    v: Float[Array, "B T G hd"],
    segments: Int[Array, "B T"],
    backend: AttentionBackend,
) -> Float[Array, "B T H hd"]:
    """Causal attention within each example of rows that hold several, in q's dtype.

    Args:
      segments: int32 `[B, T]`, the example that a token belongs to. Padding is one of them: its rows look at nothing
        else, are finite and mean nothing.
    """
    if q.shape[1] % 2:
        backend = "xla"  # cuDNN has no gradients for a bias of odd length
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return _attend(q, k, v, backend, is_causal=True, mask=same)


def attend_cache(
    q: Float[Array, "B 1 H hd"],
    keys: Float[Array, "B M G hd"],
    values: Float[Array, "B M G hd"],
    lengths: Int[Array, "B"],
    backend: AttentionBackend,
) -> Float[Array, "B 1 H hd"]:
    """Attention of one token of each request to the first `lengths` positions of its cache, in q's dtype.

    Args:
      lengths: int32 `[B]`, 1 to M. What lies behind must be finite: it is multiplied by zero.
    """
    if backend == "xla":
        return _attend(q, keys, values, backend, key_value_seq_lengths=lengths)
    return _attend(q, keys, values, backend, query_seq_lengths=jnp.ones_like(lengths), key_value_seq_lengths=lengths)


def attend_chunk(
    q: Float[Array, "B T H hd"],
    keys: Float[Array, "B M G hd"],
    values: Float[Array, "B M G hd"],
    positions: Int[Array, "B T"],
    backend: AttentionBackend,
) -> Float[Array, "B T H hd"]:
    """Attention of some tokens of each request to its cache, in which they are already, in q's dtype.

    Args:
      q: queries.
      keys: the cache's.
      values: the cache's.
      positions: int32 `[B, T]`, the place of each token: it looks at the cache up to there. What lies behind must be
        finite, as in `attend_cache`.
      backend: what runs it.
    """
    seen = jnp.arange(keys.shape[1])[None, None, None, :] <= positions[:, None, :, None]
    return _attend(q, keys, values, backend, mask=seen)


def _attend(q: Array, k: Array, v: Array, backend: AttentionBackend, **masks) -> Array:
    if backend == "xla" and q.dtype != jnp.float32:
        # jax 0.11.2: XLA cannot compile the float16 product for a GPU where a prompt has one token, and the gradient
        # of the bfloat16 one mixes dtypes where it is compiled, which a caller's strict promotion would refuse.
        dtype = q.dtype
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return _attend(q, k, v, backend, **masks).astype(dtype)
    precision = "highest" if q.dtype == jnp.float32 else "default"
    # jax's own function multiplies bfloat16 by a float32 scale, which a caller's strict promotion would refuse.
    with jax.default_matmul_precision(precision), jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, implementation=backend, **masks)


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
