"""Where a step's tokens go in a layer's cache.

Letters: B requests, T tokens of a request, M positions of the cache, W places of a ring.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_moe_lora.models.blocks.context import StepContext

LayerCache = Mapping[str, Array]
"""One layer's arrays, each `[B, ...]`, by the names that its block gives them."""


def store(old: Float[Array, "B M ..."], new: Float[Array, "B T ..."], step: StepContext) -> Float[Array, "B M ..."]:
    """An array with a place for each position, and the step's tokens in it; those at M or behind are dropped.

    Args:
      old: the cache's.
      new: the step's.
      step: what every layer reads.
    """
    if step.kind == "prompt":
        return lax.dynamic_update_slice(old, new.astype(old.dtype), (0,) * old.ndim)
    rows = jnp.arange(new.shape[0])[:, None]
    return old.at[rows, step.positions].set(new.astype(old.dtype), mode="drop")


def ring_positions(lengths: Int[Array, "B"], places: int) -> Int[Array, "B W"]:
    """The position that each place of a ring holds; below 0 for one that holds none.

    Args:
      lengths: int32 `[B]`, tokens so far.
      places: W.
    """
    last = lengths[:, None] - 1
    return last - (last - jnp.arange(places, dtype=lengths.dtype)[None, :]) % places


def places_in_ring(step: StepContext, places: int) -> Int[Array, "B T"]:
    """Where a step's tokens go in a ring; W for those that are not stored: a full request's position is none of it.

    Args:
      step: what every layer reads.
      places: W.
    """
    return jnp.where(step.row_mask, step.positions % places, places)


def store_ring(
    old: Float[Array, "B W ..."], new: Float[Array, "B T ..."], step: StepContext
) -> Float[Array, "B W ..."]:
    """A ring with the step's last tokens in it.

    Args:
      old: the cache's; position p stands in place `p % W`.
      new: the step's.
      step: what every layer reads.
    """
    places = old.shape[1]
    if step.kind == "token":
        rows = jnp.arange(new.shape[0])[:, None]
        return old.at[rows, places_in_ring(step, places)].set(new.astype(old.dtype), mode="drop")
    # Each place takes the last token that belongs into it: a scatter would meet several.
    source = ring_positions(step.starts + step.lengths, places) - step.starts[:, None]
    shape = source.shape + (1,) * (old.ndim - 2)
    taken = jnp.take_along_axis(new, source.clip(0, new.shape[1] - 1).reshape(shape), axis=1)
    return jnp.where((source >= 0).reshape(shape), taken.astype(old.dtype), old)
