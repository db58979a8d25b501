"""The loop over tiles that the XLA backends share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.plan.tiles import Tiles
from pallas_kernels.varying import varying_as

# Tiles a step. A CPU gains nothing from batching and would copy the weights; a GPU's time is the number of kernels, so
# it takes many, and the bound keeps the gathered weights small (`bench.py` compares).
CPU_CHUNK, GPU_CHUNK = 1, 64

TileFunction = Callable[
    [Int[Array, "chunk"], Int[Array, "chunk size"], Float[Array, "chunk size N"]], Float[Array, "chunk size N"]
]


def over_tiles(tiles: Tiles, out: Float[Array, "P N"], tile_rows: TileFunction, read: Any) -> Float[Array, "P N"]:
    """Replaces the rows of each tile by `tile_rows(tile indices, sorted row ids, old rows)`; others keep their bits.

    The trip count follows the tiles in use, so the cost follows the routed rows and not the table's bound.

    Args:
      tiles: which rows.
      out: the result before the loop.
      tile_rows: what becomes of a tile's rows.
      read: a pytree of the arrays that `tile_rows` reads.
    """
    if tiles.expert.shape[0] == 0:
        return out
    out = varying_as(out, tiles, read)
    return lax.platform_dependent(
        out,
        cpu=partial(_one_by_one, tiles, tile_rows),
        default=partial(_in_chunks, tiles, tile_rows, min(GPU_CHUNK, tiles.expert.shape[0])),
    )


def _one_by_one(tiles: Tiles, tile_rows: TileFunction, out: Float[Array, "P N"]) -> Float[Array, "P N"]:
    size = tiles.size
    last = out.shape[0] - size

    def step(index, out):
        # The window may begin before the tile where it would pass the end; the mask keeps its neighbours' rows.
        start = jnp.minimum(tiles.start[index], last)
        rows = start + jnp.arange(size, dtype=jnp.int32)
        in_tile = (rows >= tiles.start[index]) & (rows < tiles.start[index] + tiles.rows[index])
        old = lax.dynamic_slice_in_dim(out, start, size)
        new = tile_rows(index[None], rows[None], old[None])[0]
        return lax.dynamic_update_slice_in_dim(out, jnp.where(in_tile[:, None], new, old), start, 0)

    return lax.fori_loop(0, tiles.count.reshape(-1)[0], step, out)


def _in_chunks(tiles: Tiles, tile_rows: TileFunction, chunk: int, out: Float[Array, "P N"]) -> Float[Array, "P N"]:
    total, bound = out.shape[0], tiles.expert.shape[0]
    within = jnp.arange(tiles.size, dtype=jnp.int32)[None, :]

    def step(number, out):
        index = number * chunk + jnp.arange(chunk, dtype=jnp.int32)
        live = index < bound
        index = jnp.minimum(index, bound - 1)
        in_tile = live[:, None] & (within < tiles.rows[index][:, None])
        rows = jnp.minimum(tiles.start[index][:, None] + within, total - 1)
        new = tile_rows(index, rows, out[rows])
        return out.at[jnp.where(in_tile, rows, total)].set(new, mode="drop")

    return lax.fori_loop(0, -(-tiles.count.reshape(-1)[0] // chunk), step, out)


def window(tiles: Tiles, index: Int[Array, ""], *arrays: Float[Array, "Q _width"]) -> tuple[Array, ...]:
    """A tile's expert, and its `tiles.size` rows of each array: zeros where it has fewer rows."""
    last = arrays[0].shape[0] - tiles.size
    start = jnp.clip(tiles.start[index], 0, last)
    rows = start + jnp.arange(tiles.size, dtype=jnp.int32)
    in_tile = (rows >= tiles.start[index]) & (rows < tiles.start[index] + tiles.rows[index])
    windows = [lax.dynamic_slice_in_dim(array, start, tiles.size) for array in arrays]
    return tiles.expert[index], *(jnp.where(in_tile[:, None], rows, 0) for rows in windows)
