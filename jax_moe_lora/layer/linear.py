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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jax_moe_lora.arguments import whole
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer import checks
from jax_moe_lora.layer.packed_update import packed_update, packs
from jax_moe_lora.layer.routing import token_slots
from jax_moe_lora.layer.torch_tensors import takes_any_array
from pallas_kernels.backend import backend_named
from pallas_kernels.ops import (
    Implementation,
    LayerPages,
    LoRAPages,
    RoutingPlan,
    grouped_lora,
    make_plan,
    page_gradients,
)
from pallas_kernels.pages import Place
from pallas_kernels.pytrees import pytree
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.varying import varying_as, varying_axes
from pallas_kernels.xla import quantised_dot
from pallas_kernels.xla.dot import matmul_t

TILE_LOOP: Implementation = "xla"  # the backend of the loop that is not packed
MAX_MERGED_BYTES = 2**25  # of the float32 results of projections of the same rows


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
    return lora_linears(x, (Projection(weight, bias, pages),), plan, implementation)[0]


@dataclass(frozen=True)
class Projection:
    """One of several dense projections of the same rows.

    Attributes:
      weight: `[out, in]`, or quantised.
      bias: `[out]`, or None.
      pages: its adapters, or None for none.
    """

    weight: Float[Array, "out in"] | Quantised
    bias: Float[Array, "out"] | None = None
    pages: LoRAPages | None = None


def lora_linears(
    x: Float[Array, "T in"],
    projections: Sequence[Projection],
    plan: DensePlan | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T _"], ...]:
    """`lora_linear` of several projections of the same rows; of few rows in fewer kernels.

    Args:
      x: `[T, in]`, the rows.
      projections: weights, biases and adapters of each.
      plan: as in `lora_linear`.
      implementation: as in `lora_linear`.

    Returns:
      float32 `[T, out]` of each.

    Raises:
      InputError: as `lora_linear`.
    """
    for projection in projections:
        _check_projection(x, projection, plan)
    merged = 4 * x.shape[0] * sum(projection.weight.shape[0] for projection in projections) <= MAX_MERGED_BYTES
    # XLA merges the matmuls of rows that projections share. That saves launches, but what is large is taken apart by
    # copies; behind a barrier of its own x is another value to it.
    results = [_product(x if merged else lax.optimization_barrier(x), one.weight) for one in projections]
    if merged and _merges(projections, results):
        results = _side_by_side(results, x, projections, plan, implementation)
    else:
        # The barrier keeps XLA from folding what follows into the matmul, which would round base rows otherwise.
        results = [lax.optimization_barrier(product) for product in results]
        pairs = zip(results, projections, strict=True)
        results = [_adapted(y, x, projection.pages, plan, implementation) for y, projection in pairs]
    biases = [projection.bias for projection in projections]
    return tuple(
        y if bias is None else y + bias.astype(jnp.float32)[None] for y, bias in zip(results, biases, strict=True)
    )


def _merges(projections: Sequence[Projection], products: Sequence[Array]) -> bool:
    """Whether XLA makes one matmul of several; on a mesh each product may be split in its own way, and stays apart."""
    dtypes = {None if isinstance(one.weight, Quantised) else one.weight.dtype for one in projections}
    return len(projections) > 1 and len(dtypes) == 1 and None not in dtypes and not any(map(varying_axes, products))


def _check_projection(x: Float[Array, "T in"], projection: Projection, plan: DensePlan | None) -> None:
    weight, pages = projection.weight, projection.pages
    checks.check_linear(x, weight, projection.bias)
    if pages is None:
        return
    if plan is None:
        raise InputError("lora_linear got pages and no plan; give it dense_plan of the rows' slots.")
    num_slots = checks.check_pages("pages", pages, *reversed(weight.shape), num_experts=1)
    checks.check_dense_plan(plan.slots, plan.rows.segment_sizes.shape[1] - 1, x.shape[0], num_slots)


def _product(x: Float[Array, "T in"], weight: Float[Array, "out in"] | Quantised) -> Float[Array, "T out"]:
    return quantised_dot.matmul_t(x, weight) if isinstance(weight, Quantised) else matmul_t(x, weight)


def _side_by_side(
    products: Sequence[Array],
    x: Float[Array, "T in"],
    projections: Sequence[Projection],
    plan: DensePlan | None,
    implementation: Implementation | None,
) -> list[Array]:
    """The products and their adapters, behind one barrier for all of them: what XLA merged stays one array."""
    ends = np.cumsum([product.shape[1] for product in products])[:-1].tolist()
    merged = lax.optimization_barrier(jnp.concatenate(products, axis=1))
    pages = [projection.pages for projection in projections]
    adapted = [one for one in pages if one is not None]
    if plan is not None and adapted and all(packs(x, one, implementation) for one in adapted):
        updates = [
            jnp.zeros_like(product) if one is None else packed_update(x, one, plan.slots)
            for product, one in zip(products, pages, strict=True)
        ]
        return jnp.split(lax.optimization_barrier(merged + jnp.concatenate(updates, axis=1)), ends, axis=1)
    parts = zip(jnp.split(merged, ends, axis=1), pages, strict=True)
    return [_adapted(y, x, one, plan, implementation) for y, one in parts]


def _adapted(
    y: Float[Array, "T out"],
    x: Float[Array, "T in"],
    pages: LoRAPages | None,
    plan: DensePlan | None,
    implementation: Implementation | None,
) -> Float[Array, "T out"]:
    """A product with each row's own adapter."""
    if pages is None or plan is None:
        return y
    if packs(x, pages, implementation):
        return lax.optimization_barrier(y + packed_update(x, pages, plan.slots))
    pools = pages.a.astype(x.dtype), pages.b.astype(x.dtype)
    leaves, structure = jax.tree.flatten((pages.table, pages.scale, plan.rows))
    call = _loop_of(implementation), pages.max_rank, structure
    return lax.optimization_barrier(_looped_lora(call, *varying_as((y, x, *pools, leaves))))


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
