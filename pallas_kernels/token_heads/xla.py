"""What the kernel computes, in jax.numpy: its gradient is that of this function."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.token_heads.norm import HeadNorm


def token_heads(
    rows: Float[Array, "B width"],
    norm: HeadNorm | None,
    angles: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    place: Int[Array, "B"],
    keys: Float[Array, "B M G hd"],
    values: Float[Array, "B M G hd"],
) -> tuple[Float[Array, "B H hd"], Float[Array, "B M G hd"], Float[Array, "B M G hd"]]:
    """As `api.token_heads`, without a backend.

    Args:
      rows: as there.
      norm: as there.
      angles: as there.
      place: as there.
      keys: as there.
      values: as there.
    """
    batch, _, groups, width = keys.shape
    heads = rows.reshape(batch, -1, width).astype(keys.dtype)
    queries, new_keys, new_values = jnp.split(heads, (heads.shape[1] - 2 * groups, heads.shape[1] - groups), axis=1)
    if norm is not None:
        queries, new_keys = _normed(queries, norm.q, norm), _normed(new_keys, norm.k, norm)
    at = jnp.arange(batch), place
    return (
        _turned(queries, angles),
        keys.at[at].set(_turned(new_keys, angles), mode="drop"),
        values.at[at].set(new_values, mode="drop"),
    )


def _normed(heads: Float[Array, "B heads hd"], weight: Float[Array, "hd"], norm: HeadNorm) -> Array:
    wide = heads.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + norm.eps)
    weight = weight[None, None]
    if not (norm.offset or norm.wide):
        return normed.astype(heads.dtype) * weight
    factor = weight.astype(jnp.float32)
    return (normed * (1.0 + factor if norm.offset else factor)).astype(heads.dtype)


def _turned(heads: Float[Array, "B heads hd"], angles: tuple[Array, Array]) -> Array:
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosine, sine = (part[:, None] for part in angles)
    turned = jnp.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)
    return turned.astype(heads.dtype)
