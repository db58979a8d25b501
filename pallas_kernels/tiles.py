"""The loop over tiles that the XLA backends share."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.plan import Tiles


def over_tiles(
    tiles: Tiles,
    out: Float[Array, "P N"],
    tile_rows: Callable[[Int[Array, ""], Int[Array, "size"], Float[Array, "size N"]], Float[Array, "size N"]],
) -> Float[Array, "P N"]:
    """Replaces the rows of each tile by `tile_rows(tile index, sorted row ids, old rows)`; others keep their bits.

    The trip count is the number of tiles in use, so the cost follows the routed rows and not the table's bound.
    """
    size = tiles.size
    last = out.shape[0] - size

    def step(index, out):
        # The window may begin before the tile where it would pass the end; the mask keeps its neighbours' rows.
        start = jnp.minimum(tiles.start[index], last)
        rows = start + jnp.arange(size, dtype=jnp.int32)
        mine = (rows >= tiles.start[index]) & (rows < tiles.start[index] + tiles.rows[index])
        old = lax.dynamic_slice_in_dim(out, start, size)
        new = tile_rows(index, rows, old)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None], new, old), start, 0)

    return lax.fori_loop(0, tiles.count, step, out)
