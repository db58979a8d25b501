"""Batches: a step's rows depend on the seed and the step's number only, so a resumed run needs no stored iterator."""

import zlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import jax.numpy as jnp
import numpy as np

from jax_moe_lora.training.batch import Batch
from jax_moe_lora.training.data import Dataset
from jax_moe_lora.training.examples import Example
from pallas_kernels.ops import BASE_SLOT

Row = tuple[Example, ...]


@dataclass(frozen=True)
class Rows:
    """The examples of one adapter, laid out in rows.

    Attributes:
      slot: the adapter's.
      rows: each of one or several examples.
    """

    slot: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Feed:
    """The rows of all adapters, which take turns.

    Attributes:
      adapters: name -> its rows.
      batch_size: B.
      width: T.
      packing: rows may hold several examples.
      seed: of the order of an adapter's rows, which differs from epoch to epoch and does not depend on other adapters.
    """

    adapters: dict[str, Rows]
    batch_size: int
    width: int
    packing: bool
    seed: int

    def batch(self, step: int) -> Batch:
        """The batch of a step: a row of adapter 0, 1, ... and again from 0, continuing where the last step ended."""
        names = tuple(self.adapters)
        turns = (divmod(step * self.batch_size + row, len(names)) for row in range(self.batch_size))
        chosen = [(self.adapters[names[which]].slot, self._row(names[which], turn)) for turn, which in turns]
        return fill(chosen, self.batch_size, self.width, self.packing)

    def _row(self, name: str, turn: int) -> Row:
        rows = self.adapters[name].rows
        epoch, index = divmod(turn, len(rows))
        return rows[_order(self.seed, zlib.crc32(name.encode()), epoch, len(rows))[index]]


def make_feed(datasets: Mapping[str, Dataset], batch_size: int, width: int, packing: bool, seed: int) -> Feed:
    """Lays out the examples of all adapters.

    Args:
      datasets: adapter -> its examples; the first is slot 0.
      batch_size: B.
      width: T.
      packing: put several examples into a row.
      seed: of the order of the rows.
    """
    rows = {
        name: Rows(slot, lay_out(dataset.examples, width, packing))
        for slot, (name, dataset) in enumerate(datasets.items())
    }
    return Feed(rows, batch_size, width, packing, seed)


def lay_out(examples: Sequence[Example], width: int, packing: bool) -> tuple[Row, ...]:
    """Rows of one example each, or of as many as fit: the longest first, each into the fullest row that has room.

    Args:
      examples: of one adapter, none wider than a row.
      width: T.
      packing: put several examples into a row.
    """
    if not packing:
        return tuple((example,) for example in examples)
    rows: list[list[Example]] = []
    with_room: list[tuple[int, int]] = []  # (positions left, row), the fullest first
    for example in sorted(examples, key=lambda example: -example.width):
        fullest = bisect_left(with_room, (example.width, 0))
        if fullest < len(with_room):
            room, row = with_room.pop(fullest)
        else:
            room, row = width, len(rows)
            rows.append([])
        rows[row].append(example)
        if room > example.width:
            insort(with_room, (room - example.width, row))
    return tuple(map(tuple, rows))


def whole_batches(adapters: Mapping[str, Rows], batch_size: int, width: int, packing: bool = True) -> Iterator[Batch]:
    """Batches that hold every row once, for evaluation; the last one is filled up with rows of padding.

    Args:
      adapters: name -> its rows.
      batch_size: B.
      width: T.
      packing: rows may hold several examples.
    """
    all_rows = [(rows.slot, row) for rows in adapters.values() for row in rows.rows]
    for begin in range(0, len(all_rows), batch_size):
        yield fill(all_rows[begin : begin + batch_size], batch_size, width, packing)


def fill(rows: Sequence[tuple[int, Row]], batch_size: int, width: int, packing: bool = True) -> Batch:
    """Rows as arrays `[B, T]`.

    Args:
      rows: (slot, examples), at most B; missing rows are padding.
      batch_size: B.
      width: T.
      packing: rows may hold several examples.
    """
    tokens, positions, segments, slots, targets = (np.zeros((batch_size, width), np.int32) for _ in range(5))
    weights = np.zeros((batch_size, width), np.float32)
    slots[:] = BASE_SLOT
    for index, (slot, row) in enumerate(rows):
        begin = 0
        for number, example in enumerate(row, 1):
            here = index, slice(begin, begin + example.width)
            tokens[here], targets[here] = example.tokens[:-1], example.tokens[1:]
            positions[here], segments[here], slots[here] = np.arange(example.width), number, slot
            weights[here] = example.loss_mask[1:]
            begin += example.width
    names = "tokens", "positions", "segments", "slots", "targets", "weights"
    arrays = tokens, positions, segments, slots, targets, weights
    return Batch(packed=packing, **{name: jnp.asarray(array) for name, array in zip(names, arrays, strict=True)})


@lru_cache(maxsize=64)
def _order(seed: int, name: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, name, epoch]).permutation(count)
