"""What the Mosaic GPU kernels share: sizes of a ring stage, the walk over work items, stores of part of a tile."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels import mosaic
from pallas_kernels.hopper.limits import COMPUTE_REGISTERS, COMPUTE_WARPGROUPS, MEMORY_REGISTERS

DOWN = plgpu.Layout.WGMMA.reduce(1)  # a vector along the rows of an accumulator


def tile_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory that wgmma and TMA both read: 8-row tiles of 128-byte rows, swizzled."""
    swizzle = 128
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def row_smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory of 128-byte rows whose rows TMA stores one by one: swizzled, not tiled."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.SwizzleTransform(128),))


def run(
    body: Callable[..., None],
    out_type: Any,
    scratch: dict[str, Any],
    num_sms: int,
    warpgroups: int = COMPUTE_WARPGROUPS,
) -> Callable[..., Any]:
    """A persistent kernel: one block an SM, so many compute warpgroups and one that moves memory."""
    return mosaic.kernel(
        body,
        out_type=out_type,
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=compiler_params(),
    )


def take_registers(warpgroups: int) -> None:
    """A compute warpgroup, before its work. Where it is the only one, all have as many as a thread can use."""
    if warpgroups > 1:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")


def give_registers(warpgroups: int) -> None:
    """The memory warpgroup, before its work."""
    if warpgroups > 1:
        plgpu.set_max_registers(MEMORY_REGISTERS, action="decrease")


def compiler_params() -> plgpu.CompilerParams:
    """How Mosaic compiles the Hopper kernels."""
    return plgpu.CompilerParams(
        approx_math=True,
        unsafe_no_auto_barriers=True,  # barriers are the kernels' own
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    )


def over_items(
    count: Int[Array, ""], num_sms: int, item: Callable[[Array, Any], Any], begin: Callable[[Array], Any] = lambda z: z
) -> Any:
    """Runs `item(number, ring steps so far) -> ring steps so far` for this block's share of `count` items.

    `begin` makes the steps to begin with of a zero: it alone, or one for each ring.
    """
    first = lax.axis_index("sm")
    mine = lax.div(jnp.maximum(count - first + (num_sms - 1), 0), jnp.int32(num_sms))
    return lax.fori_loop(0, mine, lambda index, done: item(first + index * num_sms, done), begin(jnp.int32(0)))


def stage_of(step: Array, stages: int) -> Array:
    """The stage of the ring that a step uses."""
    return lax.rem(step, jnp.int32(stages))


def wait_until_empty(empty: Any, step: Array, stages: int) -> Array:
    """Memory side: the stage that `step` fills, once its last user has let go of it."""
    stage = stage_of(step, stages)

    @pl.when(step >= stages)
    def _():
        plgpu.barrier_wait(empty.at[stage])

    return stage


def drain(empty: Any, steps: Array, stages: int) -> None:
    """Memory side, at the end: sees every phase of `empty`, so that no barrier is left half way."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
        plgpu.barrier_wait(empty.at[stage_of(step, stages)])


def as_wide_as(used: Array, widths: tuple[int, ...], action: Callable[[int], None]) -> None:
    """Runs `action(width)`, code of its own each, for the first of the ascending widths that is not below `used`."""
    for fewer, width in itertools.pairwise((-1, *widths)):
        enough = True if width == widths[-1] else used <= width
        needed = True if fewer < 0 else used > fewer
        pl.when(needed & enough)(partial(action, width))


def store_rows(tile: Any, out: Any, row: Array, count: Array, columns: Any) -> None:
    """Stores the first `count` rows of `tile` `[rows, width]` to `out[row:, columns]`.

    A TMA store's size is static, so the count is met by a ladder of powers of two.
    """
    size = 1 << (tile.shape[0].bit_length() - 1)
    done: Any = 0
    while size:

        @pl.when((count & size) != 0)
        def _(size=size, done=done):
            plgpu.copy_smem_to_gmem(
                tile.at[pl.ds(done, size)], out.at[pl.ds(row + done, size), columns], commit_group=False
            )

        done = done + (count & size)
        size //= 2
    plgpu.commit_smem_to_gmem_group()
