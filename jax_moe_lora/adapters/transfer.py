"""Device side of an insertion: rows of matrices, in the order in which they lie on the host, into pages of a pool."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jax_moe_lora.adapters.packing import Packed, chunks
from pallas_kernels import RANK_PAGE

CHUNK_BYTES = 4 * 2**20


def write_pages(pool: Array, ids: np.ndarray, packed: Packed) -> Array:
    """Writes an adapter's matrices of one width into its pages `ids`. Donates `pool`.

    Rows go in chunks of one static size, so that adapters of any size and layout share two programs.
    """
    size, past_the_end = _chunk(pool), pool.shape[0] * RANK_PAGE  # where a row is dropped
    # One entry more, for the place -1.
    row_of = np.append(ids[:, None] * RANK_PAGE + np.arange(RANK_PAGE), past_the_end).astype(np.int32)
    empty = np.ones(len(row_of) - 1, bool)
    for columns in (False, True):
        for values, places in chunks(packed.stacks, columns, size, pool.dtype):
            empty[places[places >= 0]] = False
            pool = _scatter(pool, row_of[places], _transpose(values) if columns else values)
    rest = row_of[np.flatnonzero(empty)]  # rows of pages beyond their matrix's rank
    zeros = np.zeros((size, pool.shape[2]), pool.dtype)
    for begin in range(0, len(rest), size):
        rows = np.full(size, past_the_end, np.int32)
        rows[: len(rest) - begin] = rest[begin : begin + size]
        pool = _scatter(pool, rows, zeros)
    return pool


def _chunk(pool: Array | jax.ShapeDtypeStruct) -> int:
    """Rows of a chunk."""
    return max(RANK_PAGE, min(pool.shape[0] * RANK_PAGE, CHUNK_BYTES // (pool.shape[2] * pool.dtype.itemsize)))


def compile_writes(pool: jax.ShapeDtypeStruct) -> None:
    """Fills jit's caches with what `write_pages` runs on a pool of this shape."""
    rows, width = _chunk(pool), pool.shape[2]
    values = jax.ShapeDtypeStruct((rows, width), pool.dtype)
    _scatter.lower(pool, jax.ShapeDtypeStruct((rows,), jnp.int32), values).compile()
    _transpose.lower(jax.ShapeDtypeStruct((width, rows), pool.dtype)).compile()


@partial(jax.jit, donate_argnums=0)
def _scatter(pool: Array, rows: Array, values: Array) -> Array:
    return pool.reshape(-1, pool.shape[2]).at[rows].set(values, mode="drop").reshape(pool.shape)


@jax.jit
def _transpose(columns: Array) -> Array:
    return columns.T
