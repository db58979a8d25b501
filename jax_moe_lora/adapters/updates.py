"""The few programs that change a bank in place, each of one static size, so that no load compiles anything."""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.ops import RANK_PAGE

CHUNK_BYTES = 4 * 2**20


def chunk_rows(pool: Float[Array, "N 16 width"]) -> int:
    """Rows of a pool's pages that one chunk holds."""
    return max(RANK_PAGE, min(pool.shape[0] * RANK_PAGE, CHUNK_BYTES // (pool.shape[2] * pool.dtype.itemsize)))


def matrix_chunk_rows(shape: tuple[int, int], itemsize: int) -> int:
    """Rows of a whole matrix that one chunk holds.

    Args:
      shape: of the matrix.
      itemsize: bytes of a value.
    """
    return max(1, min(shape[0], CHUNK_BYTES // (shape[1] * itemsize)))


@partial(jax.jit, donate_argnums=0)
def scatter(
    pool: Float[Array, "*_N width"], rows: Int[Array, "n"], values: Float[Array, "n width"]
) -> Float[Array, "*_N width"]:
    """Writes rows of pages, or of one matrix. Donates `pool`.

    Args:
      pool: the pages, or the matrix.
      rows: which rows; those past the end are dropped.
      values: theirs.
    """
    return pool.reshape(-1, pool.shape[-1]).at[rows].set(values, mode="drop").reshape(pool.shape)


@partial(jax.jit, donate_argnums=0)
def scatter_columns(
    pool: Float[Array, "N 16 width"], rows: Int[Array, "n"], values: Float[Array, "width n"]
) -> Float[Array, "N 16 width"]:
    """As `scatter`, with a value's rows as columns.

    Args:
      pool: the pages, which are donated.
      rows: which rows; those past the end are dropped.
      values: theirs, one a column.
    """
    return scatter(pool, rows, values.T)


@partial(jax.jit, donate_argnums=(0, 1))
def set_slot(tables, scales, slot, new_tables, new_scales):
    """Replaces a slot's entries in all tables.

    Args:
      tables: the bank's, which are donated.
      scales: the bank's, which are donated.
      slot: the slot.
      new_tables: its entries of the tables.
      new_scales: its entries of the scales.
    """
    return (
        {m: t.at[:, slot].set(new_tables[m]) for m, t in tables.items()},
        {m: s.at[:, slot].set(new_scales[m]) for m, s in scales.items()},
    )


@jax.jit
def permute(pool: Float[Array, "N 16 width"], order: Int[Array, "N"]) -> Float[Array, "N 16 width"]:
    """The pages of a pool in another order.

    Args:
      pool: the pages.
      order: for each place, the page that goes there.
    """
    return pool[order]


def compile_updates(pools: Iterable[Float[Array, "_N 16 _width"]], tables, scales, new_tables, new_scales) -> None:
    """Fills jit's caches from shapes alone: nothing runs, no memory is taken.

    Args:
      pools: the bank's.
      tables: the bank's.
      scales: the bank's.
      new_tables: a slot's entries of the tables.
      new_scales: a slot's entries of the scales.
    """
    for pool in pools:
        rows, width = chunk_rows(pool), pool.shape[2]
        pages = jax.ShapeDtypeStruct(pool.shape, pool.dtype)
        ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
        scatter.lower(pages, ids, jax.ShapeDtypeStruct((rows, width), pool.dtype)).compile()
        scatter_columns.lower(pages, ids, jax.ShapeDtypeStruct((width, rows), pool.dtype)).compile()
        permute.lower(pages, jax.ShapeDtypeStruct(pages.shape[:1], jnp.int32)).compile()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (tables, scales))
    set_slot.lower(*shapes, 0, new_tables, new_scales).compile()
