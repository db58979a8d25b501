"""The few programs that change a bank in place, each of one static size, so that no load compiles anything."""

from collections.abc import Iterable
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
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


def write_rows(
    pool: Float[Array, "N 16 width"], rows: Int[Array, "n"], values: Float[Array, "_n _width"], columns: bool
) -> Float[Array, "N 16 width"]:
    """Writes rows of pages, on a mesh on each device those that it has. Donates `pool`.

    Args:
      pool: the pages.
      rows: which rows; those past the end are dropped.
      values: theirs, one a row or one a column.
      columns: which of the two.
    """
    placement = placement_of(pool)
    write = scatter_columns if columns else scatter
    return (write if placement is None else _split_write(placement, columns))(pool, rows, values)


def placement_of(array: Array) -> NamedSharding | None:
    """Where an array is on a mesh; None for one on the default device, and inside of a trace."""
    placement = None if isinstance(array, jax.core.Tracer) else array.sharding
    return placement if isinstance(placement, NamedSharding) else None


def chunk_placement(pool: Sharding | None, columns: bool) -> tuple[NamedSharding, NamedSharding] | None:
    """Where rows and values of a chunk go: each device of a mesh gets its part of the values. None without a mesh.

    Args:
      pool: where the pool is.
      columns: the values are columns.
    """
    if not isinstance(pool, NamedSharding):
        return None
    width = pool.spec[2]
    values = P(width, None) if columns else P(None, width)
    return NamedSharding(pool.mesh, P()), NamedSharding(pool.mesh, values)


@lru_cache
def _split_write(placement: NamedSharding, columns: bool):
    """`scatter` or `scatter_columns` of a pool whose regions and widths are split."""
    regions, _, _ = placement.spec
    sent = chunk_placement(placement, columns)
    assert sent is not None

    def write(pool: Array, rows: Array, values: Array) -> Array:
        if regions is not None:
            count = pool.shape[0] * RANK_PAGE
            rows = rows - lax.axis_index(regions) * count
            rows = jnp.where(rows < 0, count, rows)  # of a region before this one
        return (scatter_columns if columns else scatter)(pool, rows, values)

    specs = placement.spec, *(part.spec for part in sent)
    split = jax.shard_map(write, mesh=placement.mesh, in_specs=specs, out_specs=placement.spec)
    return jax.jit(split, donate_argnums=0)


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


def permute(pool: Float[Array, "N 16 width"], order: Int[np.ndarray, "N"]) -> Float[Array, "N 16 width"]:
    """The pages of a pool in another order.

    Args:
      pool: the pages.
      order: for each place, the page that goes there; on a mesh one of its own region.
    """
    return _permute_of(placement_of(pool))(pool, order)


@lru_cache
def _permute_of(placement: NamedSharding | None):
    if placement is None:
        return jax.jit(lambda pool, order: pool[order])
    regions, _, _ = placement.spec

    def permute(pool: Array, order: Array) -> Array:
        return pool[order if regions is None else order - lax.axis_index(regions) * pool.shape[0]]

    specs = placement.spec, P(regions)
    return jax.jit(jax.shard_map(permute, mesh=placement.mesh, in_specs=specs, out_specs=placement.spec))


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
        rows, width, placement = chunk_rows(pool), pool.shape[2], placement_of(pool)
        for columns, write in enumerate((scatter, scatter_columns)):
            sent = chunk_placement(placement, bool(columns)) or (None, None)
            ids = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=sent[0])
            shape = (width, rows) if columns else (rows, width)
            values = jax.ShapeDtypeStruct(shape, pool.dtype, sharding=sent[1])
            program = write if placement is None else _split_write(placement, bool(columns))
            program.lower(_shape(pool), ids, values).compile()
        order = jax.ShapeDtypeStruct(pool.shape[:1], jnp.int32)
        _permute_of(placement).lower(_shape(pool), order).compile()
    set_slot.lower(*jax.tree.map(_shape, (tables, scales)), 0, new_tables, new_scales).compile()


def _shape(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placement_of(array))
