"""Under `jax.shard_map`, values that must vary over the same mesh axes.

Three places need it. A loop's carry that begins as zeros must vary over the axes that the body's results vary over. A
kernel's results vary as its operands do. And the backward pass of a `jax.custom_vjp` must give each argument a
cotangent that varies as the argument does: where all arguments are marked first, the mark's own transpose sums the
cotangents of what is replicated.
"""

from typing import Any, TypeVar

import jax
from jax import lax

T = TypeVar("T")


def varying_as[T](values: T, *read: Any) -> T:
    """The values, each marked as varying over every mesh axis that one of them, or of `read`, varies over.

    Outside of `jax.shard_map` they are returned as they are.

    Args:
      values: a pytree of arrays: a loop's carry, or the arguments of a function with a backward pass of its own.
      read: pytrees of what else a loop's body reads.
    """
    axes = frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves((values, read))))

    def mark(leaf: jax.Array) -> jax.Array:
        missing = axes - varying_axes(leaf)
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(mark, values) if axes else values


def varying_axes(leaf: Any) -> frozenset[str]:
    """The mesh axes that an array varies over; none outside of `jax.shard_map`.

    Args:
      leaf: an array, traced or not.
    """
    kind = jax.typeof(leaf)
    manual = getattr(kind, "manual_axis_type", None)
    # Types had the axes themselves before they had a type of their own for all that is manual.
    return manual.varying if manual is not None else getattr(kind, "vma", frozenset())
