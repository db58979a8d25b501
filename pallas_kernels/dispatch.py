"""Dispatch on Hopper: each token's row to the sorted rows of its experts.

A block loads a few tokens' rows into shared memory by TMA and stores each of them K times, so that a row is read once
and the inverse of the sorted order is not needed.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.backend import Implementation
from pallas_kernels.mosaic import DEPTH
from pallas_kernels.plan import RoutingPlan

BUFFERS = 2
BUFFER_BYTES = 64 * 2**10


def token_rows(
    x: Float[Array, "T width"], plan: RoutingPlan, implementation: Implementation
) -> Float[Array, "Q width"]:
    """Each sorted row's token. `implementation`: that of the plan; with hopper the rows between experts are zeros."""
    if implementation != "hopper":
        return x[plan.token]
    return dispatch(x, plan.position, plan.order.shape[0]).at[_gaps(plan)].set(0, mode="drop")


def _gaps(plan: RoutingPlan) -> Int[Array, "N"]:
    """The rows between experts, and the first ones after the last; beside them numbers that are out of range."""
    ends, total = plan.group_starts + plan.group_sizes, plan.order.shape[0]
    # `group_start` leaves up to twice the alignment, less two rows.
    between = ends[:-1, None] + jnp.arange(2 * plan.alignment, dtype=jnp.int32)[None, :]
    between = jnp.where(between < plan.group_starts[1:, None], between, total).reshape(-1)
    return jnp.append(between, ends[-1] + jnp.arange(DEPTH, dtype=jnp.int32))


def dispatch(
    x: Float[Array, "T width"], position: Int[Array, "P"], num_rows: int, num_sms: int = mosaic.NUM_SMS
) -> Float[Array, "Q width"]:
    """`rows[position[t * K + k]] = x[t]`; the other rows are not written.

    Args:
      x: one row a token, its width a multiple of 64. position: sorted row of each pair. num_rows: Q.
    """
    tokens, width = x.shape
    top_k = position.shape[0] // tokens
    chunks = width // DEPTH  # a TMA box is at most 256 wide, so a row travels as [chunks, 64]
    most = max(1, min(8, BUFFER_BYTES // (width * x.dtype.itemsize)))
    together = min(most, max(1, tokens // num_sms))
    items = pl.cdiv(tokens, together)

    def dispatch_rows(position_of, x, out, buffers, full):
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
                        plgpu.copy_smem_to_gmem(buffers.at[buffer, nth], out.at[row], commit_group=False)

            plgpu.commit_smem_to_gmem_group()

        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        dispatch_rows,
        out_type=jax.ShapeDtypeStruct((num_rows, chunks, DEPTH), x.dtype),
        grid=(num_sms,),
        grid_names=("sm",),
        scratch_types=(
            plgpu.SMEM((BUFFERS, together, chunks, DEPTH), x.dtype),
            plgpu.Barrier(num_arrivals=1, num_barriers=BUFFERS),
        ),
        compiler_params=mosaic.compiler_params(),
    )
    return kernel(position, x.reshape(tokens, chunks, DEPTH)).reshape(num_rows, width)
