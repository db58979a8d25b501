"""Arrays that are split over devices, of which a process reads the parts that its own devices have.

A box is a range `(begin, end)` of each axis. Devices that have the same experts and rows and other columns share one
box, so that what a file has side by side is read once; copies on several devices are read once too.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

Box = Sequence[tuple[int, int]]
Index = tuple[slice, ...]


def whole_box(shape: Sequence[int]) -> Box:
    """The box of a whole array.

    Args:
      shape: the array's.
    """
    return [(0, size) for size in shape]


def load_parts(shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Callable[[Box], np.ndarray]) -> jax.Array:
    """An array whose parts are read for the devices of this process.

    Args:
      shape: of the whole array.
      sharding: where its parts go.
      read: a box of the array, in host memory.
    """
    of_devices = [_box(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()]
    columns = min(box[-1][0] for box in of_devices), max(box[-1][1] for box in of_devices)
    blocks: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        *others, (begin, end) = _box(index, shape)
        if tuple(others) not in blocks:
            blocks[tuple(others)] = read([*others, columns])
        return blocks[tuple(others)][..., begin - columns[0] : end - columns[0]]

    return jax.make_array_from_callback(shape, sharding, part)


def _box(index: Index | None, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    entries = (slice(None),) * len(shape) if index is None else index
    return [entry.indices(size)[:2] for entry, size in zip(entries, shape, strict=True)]
