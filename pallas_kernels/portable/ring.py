"""What the portable kernels share: the blocks that a pipeline stages in shared memory, and row numbers in registers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.backend import device_capability

MMA_ROWS, WARPS = 16, 4


def staged(shape: tuple[int | None, ...], index_map: Callable[..., tuple[Any, ...]]) -> plgpu.BlockSpec:
    """A 16-bit block that a pipeline keeps in swizzled tiles of 8 rows, which ldmatrix reads without bank conflicts.

    cp.async gives each of four warps a tile of its own, so a block of 16 rows needs tiles half as wide.
    """
    swizzle = 64 if shape[-2] == MMA_ROWS else 128
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    in_bounds = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # below sm_90 nothing checks it: plan and widths see to it
    return plgpu.BlockSpec(shape, index_map, transforms=transforms, oob_fill_mode=in_bounds)


def release_stage() -> None:
    """After a stage's last read: TMA may fill it again. cp.async, below sm_90, is ordered after reads as it is."""
    capability, _ = device_capability()
    if capability is None or capability >= (9, 0):  # jax takes a device that is no GPU for sm_90
        plgpu.commit_smem()


def iota(shape: tuple[int, int], dtype: jax.typing.DTypeLike) -> Int[Array, "rows columns"]:
    """The row of each element of an accumulator, where operands are of `dtype`."""
    return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_accumulator(shape[0], dtype))


def across(rows: int, dtype: jax.typing.DTypeLike) -> Any:
    """The layout of a vector along the columns of an accumulator of so many rows."""
    return _accumulator(rows, dtype).reduce(0)


def _accumulator(rows: int, dtype: jax.typing.DTypeLike) -> Any:
    return plgpu.Layout.MMA_ACC(dtype, m_warps=min(WARPS, rows // MMA_ROWS))


def compiler_params() -> plgpu.CompilerParams:
    """How Mosaic compiles the portable kernels."""
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
