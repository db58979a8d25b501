"""Reads an adapter back out of a bank's slot: the inverse of `insertion.py`, in the bank's dtype."""

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.addressable import fetch
from jax_moe_lora.adapters.bank import AdapterBank, check_slot, check_whole
from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, PoolWidth
from jax_moe_lora.adapters.updates import chunk_rows
from pallas_kernels.ops import RANK_PAGE


def extract(bank: AdapterBank, slot: int, name: str) -> LoRAAdapter:
    """The adapter in a slot, bit for bit as the bank holds it; the bank is not changed.

    A side that all experts share is one matrix again, and projections that alias one hold one array. Where only one
    expert has weights, a shared matrix looks like the expert's alone, and is returned as such. An empty slot gives an
    adapter without weights.

    Args:
      bank: the bank.
      slot: the slot to read.
      name: of the adapter.

    Raises:
      InputError: the slot is out of range.
    """
    check_whole(bank)
    check_slot(bank, slot)
    matrices: dict[tuple[PoolWidth, bytes], np.ndarray] = {}
    weights: dict[tuple[int, str], LoRAWeights] = {}
    for module, site in bank.sites:
        tables, scales = fetch(bank.tables[module][:, slot]), fetch(bank.scales[module][:, slot])
        for row, layer in enumerate(site.layers):
            ranks = tables[row, :, 3]
            if not ranks.any():
                continue
            sides = []
            for column, width in enumerate(site.pools):
                first = tables[row, :, column]
                key = width, np.stack((first, ranks)).tobytes()
                if key not in matrices:
                    matrices[key] = _matrices(bank.pages[width], first, ranks)
                sides.append(matrices[key])
            weights[layer, module] = LoRAWeights(sides[0], sides[1].swapaxes(1, 2), ranks, scales[row])
    replaced = {} if bank.replacements is None else bank.replacements.read(int(slot))
    return LoRAAdapter(name, weights, replacements=replaced)


def _matrices(pool: Float[Array, "N 16 width"], first: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """`[E or 1, R, width]`; a run of pages that several experts point at is one matrix."""
    live, largest = np.flatnonzero(ranks), int(ranks.max())
    shared = len(ranks) == 1 or (len(live) > 1 and len(set(first[live])) == 1)
    begins, matrix_ranks = (first[live[:1]], np.array([largest])) if shared else (first, ranks)
    pages = np.where(matrix_ranks > 0, begins, 0)[:, None] + np.arange(-(-largest // RANK_PAGE))
    # Past an expert's own pages lie other matrices; page 0 is all zeros.
    pages = np.where(np.arange(pages.shape[1]) < -(-matrix_ranks // RANK_PAGE)[:, None], pages, 0)
    return _read_pages(pool, pages.ravel()).reshape(len(matrix_ranks), -1, pool.shape[2])[:, :largest]


def _read_pages(pool: Float[Array, "N 16 width"], pages: np.ndarray) -> np.ndarray:
    """The pages `[n, 16, width]`, fetched in chunks of one size, so that one program serves every adapter."""
    size = chunk_rows(pool) // RANK_PAGE
    out = np.empty((len(pages), *pool.shape[1:]), pool.dtype)
    for begin in range(0, len(pages), size):
        ids = np.zeros(size, np.int32)
        wanted = pages[begin : begin + size]
        ids[: len(wanted)] = wanted
        out[begin : begin + size] = fetch(_gather(pool, ids))[: len(wanted)]
    return out


@jax.jit
def _gather(pool: Float[Array, "N 16 width"], pages: Int[Array, "n"]) -> Float[Array, "n 16 width"]:
    return pool[pages]
