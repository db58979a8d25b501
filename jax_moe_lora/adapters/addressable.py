"""Arrays of which a process may have only some parts: sent to devices, copied, and fetched from them.

Where a mesh has devices of several processes, no process can address all of an array. Every process calls these
functions in the same order.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding


def send(array: np.ndarray, placement: Sharding | None) -> jax.Array:
    """A host array on devices, of which each gets its part.

    Args:
      array: what every process has. Of parts for other processes' devices the values do not matter.
      placement: where it goes; None for the default device.
    """
    if placement is None or placement.is_fully_addressable:
        return jax.device_put(array, placement)
    return jax.make_array_from_callback(array.shape, placement, lambda index: array[index])


def copy(tree: Any) -> Any:
    """Arrays that share no memory with these. Nothing is compiled.

    Args:
      tree: of arrays.
    """
    leaves, form = jax.tree.flatten(tree)
    if all(leaf.is_fully_addressable for leaf in leaves):
        return jax.device_put(tree, may_alias=False)
    return jax.tree.unflatten(form, map(_copy, leaves))


def _copy(array: jax.Array) -> jax.Array:
    parts = [jax.device_put(part.data, may_alias=False) for part in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def fetch(array: jax.Array) -> np.ndarray:
    """An array in host memory, as a whole.

    Args:
      array: on any devices.
    """
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
