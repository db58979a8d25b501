"""Loop carries under `jax.shard_map`: what begins as zeros must vary over the mesh axes that the body's results do."""

from typing import Any, TypeVar

import jax
from jax import lax

T = TypeVar("T")


def varying_as[T](carry: T, *read: Any) -> T:
    """The carry's first value, marked as varying over every mesh axis that something read in the loop varies over.

    Outside of `jax.shard_map` it is returned as it is.

    Args:
      carry: a pytree of arrays.
      read: pytrees of what the loop's body reads.
    """
    axes = frozenset().union(*(_axes(leaf) for leaf in jax.tree.leaves((carry, read))))

    def mark(leaf: jax.Array) -> jax.Array:
        missing = axes - _axes(leaf)
        return lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(mark, carry) if axes else carry


def _axes(leaf: Any) -> frozenset[str]:
    kind = jax.typeof(leaf)
    manual = getattr(kind, "manual_axis_type", None)
    # Types had the axes themselves before they had a type of their own for all that is manual.
    return manual.varying if manual is not None else getattr(kind, "vma", frozenset())
