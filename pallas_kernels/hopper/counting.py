"""Counting by comparing inside a kernel, 64 values down with 64 or fewer across; what the plan kernels share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.hopper.ring import DOWN

BLOCK = 64
SQUARE = plgpu.Layout.WGMMA
ACROSS = SQUARE.reduce(0)

Square = Int[Array, "64 width"]


@dataclass(frozen=True)
class Comparisons:
    """Made inside a kernel, by each warpgroup. `row`, `column`: the place in a square; `lane`: in 64 rows.

    Attributes:
      width: how many values are across, a multiple of 8; work grows with it.
    """

    width: int = BLOCK

    @property
    def row(self) -> Square:
        """Made where it is used, as the others, so that it does not take registers meanwhile."""
        return plgpu.broadcasted_iota(jnp.int32, (BLOCK, self.width), 0, layout=SQUARE)

    @property
    def column(self) -> Square:
        return plgpu.broadcasted_iota(jnp.int32, (BLOCK, self.width), 1, layout=SQUARE)

    @property
    def lane(self) -> Int[Array, "64"]:
        """Made where it is used: Mosaic finds no layouts, or looks forever, where there is one that is not used."""
        return plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=DOWN)

    def across(self, ref: Any) -> Square:
        """As many values of memory as a square is wide, one a column."""
        return lax.broadcast_in_dim(plgpu.load(ref, layout=ACROSS, optimized=False), (BLOCK, self.width), (1,))

    def down(self, values: Int[Array, "64"]) -> Square:
        """One a row."""
        return lax.broadcast_in_dim(values, (BLOCK, self.width), (0,))

    def rows(self, ref: Any) -> Int[Array, "64"]:
        """64 values of memory, for `down`."""
        return plgpu.load(ref, layout=DOWN, optimized=False)

    def total(self, count: Any, term: Callable[[Array], Square], first: Any = 0, stride: int = 1) -> Int[Array, "64"]:
        """Sum over the columns of `term(chunk)` of every `stride`-th chunk from `first` on, one value a row."""
        zero = plgpu.layout_cast(jnp.zeros((BLOCK, self.width), jnp.int32), SQUARE)
        rounds = lax.div(count - first + (stride - 1), jnp.int32(stride))
        return lax.fori_loop(0, rounds, lambda i, acc: acc + term(first + i * stride), zero).sum(1)


class CountedPlaces(NamedTuple):
    """What a plan kernel counts. Tables of tiles have lengths that are rounded up to 64.

    Attributes:
      position: int32 `[N]`.
      sizes: int32 `[G]`, rows of each group (an expert).
      starts: int32 `[G]`, first row of each group.
      tile_expert, tile_start, tile_rows: int32 `[M]`, as in `Tiles`.
      tile_count: int32 `[64]`, all the same.
    """

    position: Int[Array, "N"]
    sizes: Int[Array, "G"]
    starts: Int[Array, "G"]
    tile_expert: Int[Array, "M"]
    tile_start: Int[Array, "M"]
    tile_rows: Int[Array, "M"]
    tile_count: Int[Array, "64"]

    @classmethod
    def from_blocks(cls, blocks: Sequence[Array], rows: int, groups: int) -> "CountedPlaces":
        """From the kernel's results, `[.., 64]` each."""
        position, sizes, starts, *tiles = (block.reshape(-1) for block in blocks)
        return cls(position[:rows], sizes[:groups], starts[:groups], *tiles)


def tiles_of(rows: Array, tile_rows: int) -> Array:
    """How many tiles so many rows take."""
    return lax.div(rows + (tile_rows - 1), jnp.int32(tile_rows))


def write_tiles(
    compare: Comparisons, chunk: Array, of_groups: tuple[Any, Any, Any], chunks: Any, tile_rows: int, outs: Any
) -> None:
    """Expert, first row and rows of 64 tiles.

    Args:
      compare: the comparisons of one warpgroup.
      chunk: which 64 tiles.
      of_groups: sizes, first rows, and tiles up to and with each expert's, `[chunks, 64]` in memory.
      chunks: how many times 64 experts.
      tile_rows: rows that a tile holds.
      outs: three tables `[N, 64]`. A tile that is not in use is all zeros.
    """
    sizes, starts, tile_ends = of_groups
    index = compare.row + chunk * BLOCK
    own = compare.total(chunks, lambda c: (compare.across(tile_ends.at[c]) <= index).astype(jnp.int32))

    def of_own(value: Callable[[Array], Square]) -> Int[Array, "64"]:
        """The value of each tile's own expert; 0 for a tile that is not in use."""
        mine = lambda c: compare.column + c * BLOCK == compare.down(own)  # noqa: E731
        return compare.total(chunks, lambda c: jnp.where(mine(c), value(c), 0))

    size = of_own(lambda c: compare.across(sizes.at[c]))
    begin = of_own(lambda c: compare.across(tile_ends.at[c])) - tiles_of(size, tile_rows)
    start = of_own(lambda c: compare.across(starts.at[c]))
    within = (compare.lane + chunk * BLOCK - begin) * tile_rows
    used = jnp.clip(size - within, 0, tile_rows)
    tile_expert, tile_start, tile_used = outs
    tile_expert[chunk] = jnp.where(used > 0, own, 0)
    tile_start[chunk] = jnp.where(used > 0, start + within, 0)
    tile_used[chunk] = used
