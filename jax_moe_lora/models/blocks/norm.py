"""Norms over the last axis."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.specs.parameter import Norm


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, "D"] | None, eps: float, offset: bool = False, wide: bool = False
) -> Float[Array, "*B D"]:
    """Root-mean-square norm over the last axis; float32 inside, x's dtype outside.

    Args:
      x: rows.
      weight: factor on each column, or None for none.
      eps: added to the mean square.
      offset: the factor is `1 + weight`, in float32 (Gemma).
      wide: the factor is the weight, in float32 (gpt-oss).
    """
    rows = x.astype(jnp.float32)
    normed = rows * lax.rsqrt(jnp.mean(rows * rows, axis=-1, keepdims=True) + eps)
    if weight is None:
        return normed.astype(x.dtype)
    weight = weight.reshape((1,) * (x.ndim - 1) + weight.shape)
    if offset or wide:
        factor = weight.astype(jnp.float32)
        return (normed * (1.0 + factor if offset else factor)).astype(x.dtype)
    return normed.astype(x.dtype) * weight


def layer_norm(
    x: Float[Array, "*B D"], weight: Float[Array, "D"], bias: Float[Array, "D"], eps: float
) -> Float[Array, "*B D"]:
    """Layer norm over the last axis; float32 inside, x's dtype outside.

    Args:
      x: rows.
      weight: factor on each column.
      bias: added to each column.
      eps: added to the variance.
    """
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    shape = (1,) * (x.ndim - 1) + weight.shape
    weight, bias = (leaf.astype(jnp.float32).reshape(shape) for leaf in (weight, bias))
    return (normed * weight + bias).astype(x.dtype)


def apply_norm(
    norm: Norm, x: Float[Array, "*B D"], weight: Float[Array, "D"], bias: Float[Array, "D"] | None = None
) -> Float[Array, "*B D"]:
    """A norm of either kind.

    Args:
      norm: its spec.
      x: rows.
      weight: its weight.
      bias: its bias, where it has one.
    """
    if norm.kind == "layer":
        assert bias is not None
        return layer_norm(x, weight, bias, norm.eps)
    return rms_norm(x, weight, norm.eps, norm.offset, norm.wide)


def norm_named(norm: Norm, x: Float[Array, "*B D"], weights: LayerParams, name: str) -> Float[Array, "*B D"]:
    """A norm of a layer.

    Args:
      norm: its spec.
      x: rows.
      weights: the layer's arrays.
      name: of its weight.
    """
    return apply_norm(norm, x, weights[name], weights.get(f"{name}_bias"))
