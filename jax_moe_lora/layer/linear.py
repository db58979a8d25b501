"""Multi-LoRA for dense projections: attention, router, head. One "expert" that every row goes to.

The base product is XLA's own matmul, with and without adapters, so base rows keep their bits: one dense weight gives
the expert kernels too few items (256 columns each: 16 for 132 SMs). The update has two forms:

- *Packed*, where the Hopper kernels run (16-bit types): the pages of all slots side by side, `H = x @ A.T` for all of
  them at once, zeros outside each row's own adapter, `y + H @ B`. Matmuls and gathers of static shapes: no sort, and no
  loop that the host steers, so a decode step stays one CUDA graph. H is rounded to x's dtype, as between two layers;
  sums and the result are float32: a router's scores are not rounded before the top-k.
- The tile loop of `grouped_lora`, elsewhere (float32 stays float32) and where the packed ranks would be too many.

Which one follows from static shapes and dtypes alone. In both a row meets its own pages in their own order, and adds
zeros for the others': mixed equals solo.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_moe_lora.arguments import whole
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer import checks
from jax_moe_lora.layer.routing import token_slots
from jax_moe_lora.layer.torch_tensors import takes_any_array
from pallas_kernels.backend import backend_named
from pallas_kernels.ops import (
    RANK_PAGE,
    Implementation,
    LayerPages,
    LoRAPages,
    RoutingPlan,
    choose,
    grouped_lora,
    make_plan,
    page_gradients,
)
from pallas_kernels.pages import Place
from pallas_kernels.pytrees import pytree
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.varying import varying_as
from pallas_kernels.xla import quantised_dot
from pallas_kernels.xla.dot import matmul, matmul_t

TILE_LOOP: Implementation = "xla"  # the backend of the loop that is not packed
MAX_MERGED_BYTES = 2**25  # of a projection's float32 result
MAX_PACKED_RANKS = 2048  # of all slots: as wide as a projection itself; beyond, most of the packed product is zeros


@pytree
@dataclass(frozen=True)
class DensePlan:
    """Which adapter each row of a step has.

    Attributes:
      slots: int32 `[T]`, adapter slot of each row, `BASE_SLOT` for none.
      rows: the same as a routing plan of one expert; not computed where nothing reads it.
    """

    slots: Int[Array, "T"]
    rows: RoutingPlan


@takes_any_array("num_slots", gives_torch=False)
def dense_plan(slots: Int[Array, "T"], num_slots: int) -> DensePlan:
    """The plan that `lora_linear` reads. One serves all dense projections of a step.

    Args:
      slots: int32 `[T]`, adapter slot of each row, `BASE_SLOT` for none.
      num_slots: S of the bank.

    Raises:
      InputError: slots that are no integers `[T]`, or an S that is no whole number.
    """
    checks.check_array("slots", slots, ("T",), "integers")
    slots, num_slots = token_slots(slots.shape[0], slots), whole("num_slots", num_slots, 0)
    return DensePlan(slots, make_plan(jnp.zeros((slots.shape[0], 1), jnp.int32), slots, 1, num_slots, TILE_LOOP))


@takes_any_array("implementation")
def lora_linear(
    x: Float[Array, "T in"],
    weight: Float[Array, "out in"] | Quantised,
    bias: Float[Array, "out"] | None = None,
    pages: LoRAPages | None = None,
    plan: DensePlan | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T out"]:
    """`x @ weight.T + bias`, plus each row's own adapter.

    Args:
      x: `[T, in]`, the rows.
      weight: `[out, in]`, or quantised: it is dequantised some rows at a time.
      bias: `[out]`, or None.
      pages: the projection's adapters, or None for none.
      plan: `dense_plan` of the rows' slots.
      implementation: "xla" and "reference" ask for the tile loop.

    Returns:
      float32 `[T, out]`; rows without an adapter have the bits that they have with `pages=None`.

    Raises:
      InputError: pages without a plan, or a plan of other rows or slots; shapes that disagree, or dtypes of another
        kind.
    """
    checks.check_linear(x, weight, bias)
    if pages is not None:
        if plan is None:
            raise InputError("lora_linear got pages and no plan; give it dense_plan of the rows' slots.")
        num_slots = checks.check_pages("pages", pages, *reversed(weight.shape), num_experts=1)
        checks.check_dense_plan(plan.slots, plan.rows.segment_sizes.shape[1] - 1, x.shape[0], num_slots)
    if 4 * x.shape[0] * weight.shape[0] > MAX_MERGED_BYTES:
        # XLA would merge the matmuls of rows that projections share. That saves launches, but what is merged is taken
        # apart by copies; behind a barrier x is another value to it.
        x = lax.optimization_barrier(x)
    # The barrier keeps XLA from folding what follows into the matmul, which would round base rows otherwise.
    product = quantised_dot.matmul_t(x, weight) if isinstance(weight, Quantised) else matmul_t(x, weight)
    y = lax.optimization_barrier(product)
    if pages is not None and plan is not None:
        if packs(x, pages, implementation):
            y = packed_lora(y, x, pages, plan.slots)
        else:
            pools = pages.a.astype(x.dtype), pages.b.astype(x.dtype)
            leaves, structure = jax.tree.flatten((pages.table, pages.scale, plan.rows))
            call = _loop_of(implementation), pages.max_rank, structure
            y = _looped_lora(call, *varying_as((y, x, *pools, leaves)))
        y = lax.optimization_barrier(y)
    return y if bias is None else y + bias.astype(jnp.float32)[None]


def packs(x: Float[Array, "T in"], pages: LoRAPages, implementation: Implementation | None) -> bool:
    """Whether the packed form serves this call.

    Args:
      x: `[T, in]`, the rows.
      pages: the projection's adapters.
      implementation: a backend by name, or None for the best.

    Raises:
      UnsupportedImplementation: no backend has this name.
    """
    if implementation is not None and not backend_named(implementation).packs_dense:
        return False
    ranks = min(pages.table.shape[0], x.shape[0]) * -(-pages.max_rank // RANK_PAGE) * RANK_PAGE
    return ranks <= MAX_PACKED_RANKS and backend_named(choose(dtype=x.dtype).picked).packs_dense


def _loop_of(implementation: Implementation | None) -> Implementation:
    """The backend that runs the tile loop: the one that was asked for, where it has the op."""
    asked = implementation is not None and backend_named(implementation).has("grouped_lora")
    return implementation if asked else TILE_LOOP  # type: ignore[return-value]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _looped_lora(static, y, x, a, b, leaves) -> Float[Array, "T out"]:
    """The tile loop; `static`: the backend, the largest rank, and of what the leaves make table, scale and plan."""
    implementation, max_rank, structure = static
    table, scale, rows = jax.tree.unflatten(structure, leaves)
    pages = LoRAPages(a, b, table, scale, max_rank)
    return grouped_lora(y[rows.order], x, pages, rows, rows.token, implementation)[rows.position]


def _looped_forward(static, y, x, *others):
    return _looped_lora(static, y, x, *others), (x, *others)


def _looped_backward(static, kept, dy):
    implementation, max_rank, structure = static
    x, a, b, leaves = kept
    table, scale, rows = jax.tree.unflatten(structure, leaves)
    pages = LoRAPages(a, b, table, scale, max_rank)
    rows_dy = dy[rows.order]
    zeros = jnp.zeros((rows_dy.shape[0], x.shape[1]), jnp.float32)
    dx = grouped_lora(zeros, rows_dy, pages.transposed(), rows, None, implementation)[rows.position]
    module = LayerPages({"a": a, "b": b}, {"linear": table}, {"linear": scale}, (Place("linear", "a", "b"),), max_rank)
    (sums,) = page_gradients(x[rows.token], (rows_dy,), module, rows, implementation)
    assert sums is not None
    da, db = sums
    return dy, dx.astype(x.dtype), da.astype(a.dtype), db.astype(b.dtype), [None] * len(leaves)


_looped_lora.defvjp(_looped_forward, _looped_backward)


def packed_lora(
    y: Float[Array, "T out"], x: Float[Array, "T in"], pages: LoRAPages, slots: Int[Array, "T"]
) -> Float[Array, "T out"]:
    """`y[t] + scale[s] * (x[t] @ A[s].T) @ B[s].T` with s the row's slot, by two matmuls over all slots' pages.

    Args:
      y: float32 `[T, out]`, the base projection.
      x: `[T, in]`, its rows.
      pages: the projection's adapters.
      slots: int32 `[T]`; a row whose slot is outside `0 .. S - 1` gets its own y.

    Returns:
      float32 `[T, out]`.
    """
    tokens, num_slots = x.shape[0], pages.table.shape[0]
    adapted = (slots >= 0) & (slots < num_slots)
    if num_slots <= tokens:  # a block of columns a slot
        table, scale = pages.table[:, 0], pages.scale[:, 0]
        uses_block = slots[:, None] == jnp.arange(num_slots, dtype=slots.dtype)[None, :]
    else:  # a block a row, for a bank of many slots and a batch of few rows
        of_row = jnp.where(adapted, slots, 0)
        table, scale = pages.table[of_row, 0], pages.scale[of_row, 0]
        uses_block = adapted[:, None] & jnp.eye(tokens, dtype=bool)
    page = jnp.arange(-(-pages.max_rank // RANK_PAGE), dtype=jnp.int32)[None, :]
    live = page < table[:, 2:3]

    def packed(pool: Array, first: Array) -> Array:
        """`[ranks, width]`: the blocks' pages one after the other, zeros (page 0) where a block has fewer."""
        return pool[jnp.where(live, first + page, 0).reshape(-1)].reshape(-1, pool.shape[-1]).astype(x.dtype)

    # Behind a barrier x is another value to XLA, which would merge this product into the base one and change its bits.
    hidden = matmul_t(lax.optimization_barrier(x), packed(pages.a, table[:, 0:1]))
    hidden = hidden.reshape(tokens, table.shape[0], -1) * scale[None, :, None]
    hidden = jnp.where(uses_block[:, :, None], hidden, 0.0).reshape(tokens, -1).astype(x.dtype)
    b = packed(pages.b, table[:, 1:2])
    return y + lax.optimization_barrier(matmul(hidden, b))
