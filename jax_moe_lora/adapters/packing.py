"""Host side of an insertion: an adapter's matrices as rows of pages, and where in the bank they go.

Nothing is copied or re-ordered before it is sent: a file's B, whose columns are the bank's rows, goes to the device in
its order in memory, and is transposed there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 by it)
import numpy as np

from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, PoolWidth, Site, memory_of
from pallas_kernels.constants import RANK_PAGE


def pages_of(ranks: np.ndarray) -> np.ndarray:
    """Pages that a matrix of each rank takes."""
    return -(-ranks // RANK_PAGE)


@dataclass(frozen=True)
class Stack:
    """Matrices of one width as they lie in memory.

    Attributes:
      matrices: a view `[X, Y, width]`, X and Y experts and ranks, the one first whose steps are longer.
      places: int `[X, Y]`, row among the adapter's pages that each row goes to; -1 for a rank that an expert lacks.
      columns: whether rows are columns in memory.
    """

    matrices: np.ndarray
    places: np.ndarray
    columns: bool

    @property
    def rows(self) -> np.ndarray:
        """`[X * Y, width]`, a view wherever numpy can make one."""
        width = self.matrices.shape[2]
        if self.columns:
            return self.matrices.transpose(2, 0, 1).reshape(width, -1).T
        return self.matrices.reshape(-1, width)


@dataclass
class Packed:
    """All matrices of one width.

    Attributes:
      stacks: where the rows of the matrices go in pages.
      runs: for each stack, the pages of each of its matrices.
      regions: for each stack, the region of the pool that each of its matrices goes to.
      num_runs: matrices so far.
      num_pages: pages so far.
    """

    stacks: list[Stack] = field(default_factory=list)
    runs: list[np.ndarray] = field(default_factory=list)
    regions: list[np.ndarray] = field(default_factory=list)
    num_runs: int = 0
    num_pages: int = 0

    def add(self, matrices: np.ndarray, ranks: np.ndarray, regions: np.ndarray) -> np.ndarray:
        """Adds matrices.

        Args:
          matrices: `[n, R, width]`.
          ranks: int `[n]`, the rows of each that are used.
          regions: int `[n]`, where each goes.

        Returns:
          int `[n]`: the run of each matrix; -1 for rank 0.
        """
        counts = pages_of(ranks)
        first_row = (self.num_pages + np.cumsum(counts) - counts) * RANK_PAGE
        rank = np.arange(matrices.shape[1])
        places = np.where(rank < ranks[:, None], first_row[:, None] + rank, -1)
        if matrices.strides[0] < matrices.strides[1]:
            matrices, places = matrices.swapaxes(0, 1), places.T
        columns = matrices.strides[2] > min(matrices.strides[:2])
        self.stacks.append(Stack(matrices, places, columns))
        present = ranks > 0
        runs = np.where(present, self.num_runs + np.cumsum(present) - 1, -1)
        self.runs.append(counts[present])
        self.regions.append(regions[present])
        self.num_runs += int(present.sum())
        self.num_pages += int(counts.sum())
        return runs


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as pages by width, and for each site the run of every expert's A and B.

    Attributes:
      widths: width -> pages and runs.
      entries: (layer, module) -> (runs of A [E], runs of B [E], ranks [E]); a run of -1 has no pages.
    """

    widths: Mapping[PoolWidth, Packed]
    entries: Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray]]

    def nbytes(self, dtype: np.dtype) -> int:
        """Bytes of its pages in a bank of this dtype."""
        return sum(packed.num_pages * RANK_PAGE * int(width) for width, packed in self.widths.items()) * dtype.itemsize


def pack(adapter: LoRAAdapter, sites: Mapping[str, Site]) -> PackedAdapter:
    """Where an adapter's matrices go. Nothing is copied; a shared or aliased matrix is packed once in each region.

    Args:
      adapter: the adapter, which fits the sites.
      sites: the bank's projections.
    """
    widths: dict[PoolWidth, Packed] = {}
    entries: dict[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    packed_before: dict[tuple[tuple[Any, ...], str, bytes], np.ndarray] = {}
    for (layer, module), weights in adapter.weights.items():
        site = sites[module]
        runs = []
        for side, width in zip(("a", "b"), site.pools, strict=True):
            # Arrays stay alive in the adapter, so their memory names one matrix.
            identity = ((*memory_of(getattr(weights, side)), width), side, weights.ranks.tobytes())
            if identity not in packed_before:
                packed = widths.setdefault(width, Packed())
                packed_before[identity] = _pack_side(weights, side, packed, site.regions)
            runs.append(packed_before[identity])
        entries[layer, module] = (runs[0], runs[1], weights.ranks)
    return PackedAdapter(widths, entries)


def bank_nbytes(adapter: LoRAAdapter, sites: Mapping[str, Site], dtype: np.dtype) -> int:
    """Bytes of a bank that an adapter which fits takes: its pages, and its whole matrices.

    Args:
      adapter: the adapter.
      sites: the bank's projections.
      dtype: the bank's.
    """
    matrices = {memory_of(matrix): matrix.size for matrix in adapter.replacements.values()}
    return pack(adapter, sites).nbytes(dtype) + sum(matrices.values()) * dtype.itemsize


def _pack_side(weights: LoRAWeights, side: str, packed: Packed, regions: int) -> np.ndarray:
    """Adds one side's matrices to `packed`; returns the run of each expert `[E]`."""
    ranks = weights.ranks
    matrices = weights.a if side == "a" else weights.b.swapaxes(1, 2)  # [E or 1, R, width]
    of_regions = ranks.reshape(regions, -1)
    if matrices.shape[0] == len(ranks):
        return packed.add(matrices, ranks, np.repeat(np.arange(regions), of_regions.shape[1]))
    shared = [
        packed.add(matrices, of_region.max(initial=0, keepdims=True), np.array([region]))
        for region, of_region in enumerate(of_regions)
    ]
    return np.where(ranks > 0, np.repeat(np.concatenate(shared), of_regions.shape[1]), -1)


def chunks(stacks: list[Stack], columns: bool, size: int, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of the stacks that lie one way in memory, in chunks of one size.

    Args:
      stacks: the stacks.
      columns: which way: the stacks whose rows are columns in memory, or the others.
      size: rows of a chunk.
      dtype: of the chunks.

    Yields:
      Values `[size, width]` in `dtype`, or `[width, size]` for columns, and the place of each row `[size]`. Rows left
      over in the last chunk have place -1 and undefined values.
    """
    values, places, used = np.zeros((0, 0), dtype), np.zeros(0, np.int64), 0
    for stack in stacks:
        if stack.columns is not columns:
            continue
        rows, stack_places = stack.rows, stack.places.ravel()
        begin = 0
        while begin < len(stack_places):
            if used == len(places):  # none yet, or the last one is full
                shape = (rows.shape[1], size) if columns else (size, rows.shape[1])
                values, places, used = np.empty(shape, dtype), np.full(size, -1), 0
            taken = min(size - used, len(stack_places) - begin)
            filled = values.T if columns else values
            filled[used : used + taken] = rows[begin : begin + taken]
            places[used : used + taken] = stack_places[begin : begin + taken]
            used, begin = used + taken, begin + taken
            if used == size:
                yield values, places
    if 0 < used < len(places):
        yield values, places


def allocate(free: np.ndarray, runs: np.ndarray) -> np.ndarray | None:
    """First page of each run, out of the free pages, longest runs first; None where a run finds no room.

    Args:
      free: bool `[N]`, the pages that are free.
      runs: int `[n]`, pages of each run, which must lie side by side.
    """
    free = free.copy()
    first = np.zeros(len(runs), np.int64)
    for length in np.unique(runs)[::-1]:
        wanted = np.flatnonzero(runs == length)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], free, [False])).astype(np.int8)))
        begins, fits = edges[::2], (edges[1::2] - edges[::2]) // length
        within = np.arange(fits.sum()) - np.repeat(np.cumsum(fits) - fits, fits)
        starts = np.repeat(begins, fits) + within * length
        if len(starts) < len(wanted):
            return None
        first[wanted] = starts[: len(wanted)]
        free[(first[wanted, None] + np.arange(length)).ravel()] = False
    return first


def allocate_in_regions(free: np.ndarray, packed: Packed, regions: int) -> np.ndarray | None:
    """First page of each run, in the region that it goes to.

    Args:
      free: bool `[N]`, the pages that are free.
      packed: the runs.
      regions: of the pool, of equal size.

    Returns:
      int `[n]`; None where a run finds no room, though there may be enough pages.
    """
    runs, region_of = np.concatenate(packed.runs), np.concatenate(packed.regions)
    first = np.zeros(len(runs), np.int64)
    for region, pages in enumerate(free.reshape(regions, -1)):
        inside = allocate(pages, runs[region_of == region])
        if inside is None:
            return None
        first[region_of == region] = inside + region * len(pages)
    return first


def missing_pages(free: np.ndarray, packed: Packed, regions: int) -> bool:
    """Whether some region has too few pages, wherever they lie.

    Args:
      free: bool `[N]`, the pages that are free.
      packed: the runs.
      regions: of the pool, of equal size.
    """
    wanted = np.bincount(np.concatenate(packed.regions), np.concatenate(packed.runs), regions)
    return bool((wanted > free.reshape(regions, -1).sum(axis=1)).any())


def page_ids(first: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """The page that each packed page goes to, run after run.

    Args:
      first: int `[n]`, the first page of each run.
      runs: int `[n]`, the pages of each run.
    """
    offsets = np.arange(runs.sum()) - np.repeat(np.cumsum(runs) - runs, runs)
    return np.repeat(first, runs) + offsets
