"""Results of which each device of a mesh has a part, and their sum.

Under `jax.shard_map` the type of an array says which axes of the mesh it varies over. A projection whose input columns
are split gives each device a part of its result, which varies over the axes that split them. So a block needs no word
about the mesh but one `total` at its end: it is the sum over the devices where there is something to sum, and nothing
else where the block is whole on each device, or where there is no mesh.
"""

from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.varying import varying_axes

EXPERT_AXIS, TENSOR_AXIS = "expert", "tensor"
MODEL_AXES = (EXPERT_AXIS, TENSOR_AXIS)
"""The axes of a mesh that split a model. Rows that vary over another one are other requests."""


def total(*parts: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
    """The sum of the parts of all devices, by one collective at most.

    Args:
      parts: each split over the devices, or whole on each of them.
    """
    axes = _model_axes(*parts)
    if not axes:
        return reduce(add, parts)
    return lax.psum(reduce(add, (_on_first(part, axes) for part in parts)), axes)


def total_of_each(*parts: Float[Array, "*rows D"]) -> tuple[Float[Array, "*rows D"], ...]:
    """`total` of each, by one collective for all of them.

    Args:
      parts: of one shape.
    """
    axes = _model_axes(*parts)
    if not axes:
        return parts
    sums = lax.psum(jnp.stack([_on_first(part, axes) for part in parts]), axes)
    return tuple(sums[index] for index in range(len(parts)))


def added_once[Bias: Array | None](bias: Bias, weight: Any) -> Bias:
    """A projection's bias, zero on all devices but one of those whose results are summed.

    Args:
      bias: the bias, or None.
      weight: the projection's, quantised or not.
    """
    return bias if bias is None else _on_first(bias, _model_axes(*jax.tree.leaves(weight)))  # type: ignore[return-value]


def total_over_rows[Tree](sums: Tree) -> Tree:
    """Sums over the rows that a device has, added up over the devices that have other rows; by one collective.

    Args:
      sums: a tree of arrays.
    """
    leaves = jax.tree.leaves(sums)
    axes = frozenset().union(*(varying_axes(leaf) for leaf in leaves)) - {*MODEL_AXES}
    return lax.psum(sums, tuple(sorted(axes))) if axes else sums


def _model_axes(*parts: Array) -> tuple[str, ...]:
    """The axes of the model that some part varies over."""
    varying = frozenset().union(*(varying_axes(part) for part in parts))
    return tuple(axis for axis in MODEL_AXES if axis in varying)


def _on_first(part: Array, axes: tuple[str, ...]) -> Array:
    """The part; where it is the same on all devices of an axis, zeros on all of them but the first."""
    for axis in axes:
        if axis not in varying_axes(part):
            part = jnp.where(lax.axis_index(axis) == 0, part, jnp.zeros_like(part))
    return part
