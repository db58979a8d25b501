"""Dispatch on Hopper: each token's row to the sorted rows of its experts.

A block loads a few tokens' rows into shared memory by TMA and stores each of them K times, so that a row is read once
and the inverse of the sorted order is not needed.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.backend import target_sms
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.limits import DEPTH
from pallas_kernels.plan.api import RoutingPlan

BUFFERS = 2
BUFFER_BYTES = 64 * 2**10


def token_rows(x: Float[Array, "T width"], plan: RoutingPlan, *, clear: bool = True) -> Float[Array, "Q width"]:
    """What `api.token_rows` promises, by a kernel."""
    return dispatch(x, plan.position, plan.order.shape[0], gaps=_gaps(plan) if clear else None)


def weighted_sum(
    rows: Float[Array, "Q width"], weights: Float[Array, "T K"], position: Int[Array, "T K"], live: Bool[Array, "T K"]
) -> Float[Array, "T width"]:
    """What `api.combine` promises, as one reduction, which XLA makes one kernel of; arguments as in `xla.py`."""
    # Both are masked: a skipped pair's row is undefined, and a gradient of zero times NaN is NaN.
    taken = jnp.where(live[..., None], rows[position].astype(jnp.float32), 0.0)
    return (jnp.where(live, weights, 0.0)[..., None] * taken).sum(axis=1)


class Gaps(NamedTuple):
    """Rows of no pair.

    Attributes:
      end: int32 `[1]`, all experts' rows lie before it.
      rows: int32 `[N]`, which to clear.
    """

    end: Int[Array, "1"]
    rows: Int[Array, "N"]


def _gaps(plan: RoutingPlan) -> Gaps:
    """The rows between experts, and the first ones after the last; beside them numbers that are out of range."""
    ends, total = plan.group_starts + plan.group_sizes, plan.order.shape[0]
    # `group_start` leaves up to twice the alignment, less two rows.
    between = ends[:-1, None] + jnp.arange(2 * plan.alignment, dtype=jnp.int32)[None, :]
    between = jnp.where(between < plan.group_starts[1:, None], between, total).reshape(-1)
    return Gaps(ends[-1:], jnp.append(between, ends[-1] + jnp.arange(DEPTH, dtype=jnp.int32)))


def dispatch(
    x: Float[Array, "T width"],
    position: Int[Array, "P"],
    num_rows: int,
    num_sms: int | None = None,
    gaps: Gaps | None = None,
) -> Float[Array, "Q width"]:
    """`rows[position[t * K + k]] = x[t]`; the other rows are not written.

    Args:
      x: one row per token, its width a multiple of 64.
      position: sorted row of each pair.
      num_rows: Q.
      num_sms: blocks; those of the target where None.
      gaps: rows that become zeros, out of range ones aside. Pairs that the plan skips, which come after `end`, are then
        not copied.
    """
    num_sms = num_sms or target_sms()
    tokens, width = x.shape
    top_k = position.shape[0] // tokens
    chunks = width // DEPTH  # a TMA box is at most 256 wide, so a row travels as [chunks, 64]
    most = max(1, min(8, BUFFER_BYTES // (width * x.dtype.itemsize)))
    together = min(most, max(1, tokens // num_sms))
    items = pl.cdiv(tokens, together)

    def dispatch_rows(position_of, x, *refs, buffers, full, zeros=None):
        *of_gaps, out = refs
        first = lax.axis_index("sm")
        mine = lax.div(jnp.maximum(items - first + (num_sms - 1), 0), jnp.int32(num_sms))

        def load(index):
            token = (first + index * num_sms) * together
            buffer = lax.rem(index, jnp.int32(BUFFERS))
            plgpu.copy_gmem_to_smem(x.at[pl.ds(token, together)], buffers.at[buffer], full.at[buffer])

        @pl.when(mine > 0)
        def _():
            load(jnp.int32(0))

        @pl.loop(0, mine)
        def _(index):
            buffer = lax.rem(index, jnp.int32(BUFFERS))
            plgpu.barrier_wait(full.at[buffer])

            @pl.when(index + 1 < mine)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the other buffer's rows are on their way
                load(index + 1)

            for nth in range(together):
                token = (first + index * num_sms) * together + nth

                @pl.when(token < tokens)
                def _(nth=nth, token=token):
                    for row in [position_of[token * top_k + k] for k in range(top_k)]:
                        copy = partial(plgpu.copy_smem_to_gmem, buffers.at[buffer, nth], commit_group=False)
                        if of_gaps:
                            pl.when(row < of_gaps[0][0])(lambda row=row, copy=copy: copy(out.at[row]))
                        else:
                            copy(out.at[row])

            plgpu.commit_smem_to_gmem_group()

        if of_gaps:
            _, row_of = of_gaps
            zeros[...] = jnp.zeros(zeros.shape, x.dtype)
            plgpu.commit_smem()
            count = row_of.shape[0]

            @pl.loop(0, lax.div(jnp.maximum(count - first + (num_sms - 1), 0), jnp.int32(num_sms)))
            def _(index):
                row = row_of[first + index * num_sms]

                @pl.when((row >= 0) & (row < num_rows))
                def _():
                    plgpu.copy_smem_to_gmem(zeros.at[pl.ds(0, chunks)], out.at[row], commit_group=False)

            plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)

    scratch: dict[str, Any] = {
        "buffers": plgpu.SMEM((BUFFERS, together, chunks, DEPTH), x.dtype),
        "full": plgpu.Barrier(num_arrivals=1, num_barriers=BUFFERS),
    }
    if gaps is not None:  # a warpgroup stores 8 bytes a thread at once, so whole multiples of that
        scratch["zeros"] = plgpu.SMEM((pl.cdiv(chunks, 8) * 8, DEPTH), x.dtype)
    kernel = mosaic.kernel(
        dispatch_rows,
        out_type=jax.ShapeDtypeStruct((num_rows, chunks, DEPTH), x.dtype),
        grid=(num_sms,),
        grid_names=("sm",),
        scratch_types=scratch,
        compiler_params=ring.compiler_params(),
    )
    return kernel(position, x.reshape(tokens, chunks, DEPTH), *(gaps or ())).reshape(num_rows, width)
