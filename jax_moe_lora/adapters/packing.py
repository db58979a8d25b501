"""Host side of an insertion: an adapter's matrices as pages, and where in the bank they go."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 by it)
import numpy as np

from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, Site
from pallas_kernels import RANK_PAGE


def pages_of(ranks: np.ndarray) -> np.ndarray:
    """Pages that a matrix of each rank takes."""
    return -(-ranks // RANK_PAGE)


@dataclass
class Packed:
    """All matrices of one width: pages in the order of their runs, and the length of each run."""

    pages: list[np.ndarray] = field(default_factory=list)
    runs: list[np.ndarray] = field(default_factory=list)
    num_runs: int = 0

    def add(self, pages: np.ndarray, runs: np.ndarray) -> int:
        """Takes a matrix stack's pages `[n, 16, width]` in runs; returns the index of its first run."""
        first = self.num_runs
        self.pages.append(pages)
        self.runs.append(runs)
        self.num_runs += len(runs)
        return first


@dataclass(frozen=True)
class PackedAdapter:
    """An adapter as pages by width, and for each site the run of every expert's A and B.

    Attributes:
      widths: width -> pages and runs.
      entries: (layer, module) -> (runs of A [E], runs of B [E], ranks [E]); a run of -1 has no pages.
    """

    widths: Mapping[int, Packed]
    entries: Mapping[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray]]


def pack(adapter: LoRAAdapter, sites: Mapping[str, Site], dtype: np.dtype) -> PackedAdapter:
    """Cuts an adapter's matrices into pages of the bank's dtype; a shared or aliased matrix is packed once."""
    widths: dict[int, Packed] = {}
    entries: dict[tuple[int, str], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    packed_before: dict[tuple[int, str, bytes], np.ndarray] = {}
    for (layer, module), weights in adapter.weights.items():
        site = sites[module]
        runs = []
        for side, width in (("a", site.in_width), ("b", site.out_width)):
            # Arrays stay alive in the adapter, so an id names one matrix.
            identity = (id(getattr(weights, side)), side, weights.ranks.tobytes())
            if identity not in packed_before:
                packed_before[identity] = _pack_side(weights, side, widths.setdefault(width, Packed()), dtype)
            runs.append(packed_before[identity])
        entries[layer, module] = (runs[0], runs[1], weights.ranks)
    return PackedAdapter(widths, entries)


def _pack_side(weights: LoRAWeights, side: str, packed: Packed, dtype: np.dtype) -> np.ndarray:
    """Adds one side's matrices to `packed`; returns the run of each expert `[E]`."""
    ranks = weights.ranks
    matrices = weights.a if side == "a" else weights.b.swapaxes(1, 2)  # [E or 1, R, width]
    shared = matrices.shape[0] == 1
    own_ranks = np.array([ranks.max(initial=0)]) if shared else ranks
    present = np.flatnonzero(own_ranks)
    if present.size == 0:
        return np.full(len(ranks), -1, np.int64)
    counts = pages_of(own_ranks[present])
    largest = int(counts.max())
    padded = np.zeros((len(present), largest * RANK_PAGE, matrices.shape[2]), dtype)
    kept = min(matrices.shape[1], largest * RANK_PAGE)
    padded[:, :kept] = matrices[present, :kept]
    padded[np.arange(largest * RANK_PAGE) >= own_ranks[present, None]] = 0
    pages = padded.reshape(len(present), largest, RANK_PAGE, -1)[np.arange(largest) < counts[:, None]]
    first = packed.add(pages, counts)
    runs = np.full(len(own_ranks), -1, np.int64)
    runs[present] = first + np.arange(len(present))
    return np.where(ranks > 0, runs[0], -1) if shared else runs


def allocate(free: np.ndarray, runs: np.ndarray) -> np.ndarray | None:
    """First page of each run, out of the free pages, longest runs first; None where a run finds no room.

    Args:
      free: bool `[N]`. runs: int `[n]`, pages of each run, which must lie side by side.
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


def page_ids(first: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """The page that each packed page goes to, run after run."""
    offsets = np.arange(runs.sum()) - np.repeat(np.cumsum(runs) - runs, runs)
    return np.repeat(first, runs) + offsets
