"""Which pages each row tile needs: the adapters' work, cut into steps of four pages.

An entry is one page of A with the page(s) of B that belong to it, a run of the tile's rows (those of one slot) and a
scale. Four entries of a tile make a step: 64 ranks, which a kernel multiplies as it multiplies 64 elements of K. The
step's H is `[tile rows, 64]`: each entry's 16 columns hold `scale * x A^T` in its own rows and zeros in the others that
the tile has (beyond them anything), so that `H @ B` adds to each row its own adapter's update and to a base row
nothing.

Where two projections share their input (gate and up) an entry serves both if they alias their A, and has the zero page
for the other one if not.

Where a tile's H lies follows from the tile alone: from the runs that can come before it, not from those that do. So no
tile waits for another, and a tile's list is one warpgroup's work (`hopper_kernel.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import BACKENDS
from pallas_kernels.errors import InputError
from pallas_kernels.lora_steps.entries import BEGIN, PAGE_A, PAGE_B0, PAGE_B1
from pallas_kernels.pages import LayerPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.plan.tiles import Tiles
from pallas_kernels.pytrees import pytree


@dataclass(frozen=True)
class StepLayout:
    """How the steps of one projection, or of two that share their input, are cut.

    Attributes:
      projections: 1 or 2.
      one_pool: their pages of A are in one pool.
      most: entries of one run (the rows of one slot, or neighbours of one slot in a plan of few tokens) in one tile.
      length: entries of one tile, a multiple of 64.
      by_rows: fewer rows than experts times slots, so that rows bound the runs.
    """

    projections: int
    one_pool: bool
    most: int
    length: int
    by_rows: bool


@pytree
@dataclass(frozen=True)
class LoRASteps:
    """The LoRA steps of all tiles.

    Attributes:
      first: int32 `[N, 64]`, the number of each tile's first step, 64 times.
      count: int32 `[N, 64]`, how many steps each tile has, 64 times.
      entries: int32 `[6, N, J]`, the fields of each tile's entries (`entries.PAGE_A` and so on): page of A (page p
        of the second pool is `~p`), page of B for the first projection and for the last, first row and end of the run
        of the tile's rows, bits of the scale.
      bound: static; all steps have lower numbers.
      tile_rows: static, of one tile.
      max_steps: static, of one tile.
      layout: static, how the steps are cut.
    """

    first: Int[Array, "N 64"]
    count: Int[Array, "N 64"]
    entries: Int[Array, "fields N J"]
    bound: int = field(metadata={"static": True})
    tile_rows: int = field(metadata={"static": True})
    max_steps: int = field(metadata={"static": True})
    layout: StepLayout = field(metadata={"static": True})

    def transposed(self, part: int = 0) -> "LoRASteps":
        """The same steps for one of the projections, transposed: its pages of A and of B change places.

        Entries of the other projection alone get the zero page on both sides.
        """
        page_a, page_b = self.entries[PAGE_A], self.entries[(PAGE_B0, PAGE_B1)[part]]
        page_a = jnp.where(page_b > 0, jnp.where(page_a < 0, ~page_a, page_a), 0)
        entries = jnp.stack([page_b, page_a, page_a, *self.entries[BEGIN:]])
        return replace(self, entries=entries, layout=replace(self.layout, projections=1, one_pool=True))


@pytree
@dataclass(frozen=True)
class Shrunk:
    """What the adapters' shrink made of the rows of a projection, or of two that share them.

    Attributes:
      steps: the steps that were shrunk by.
      hidden: `[N, tile rows, 64]`, H of each of the steps; rows that a tile does not have are undefined.
    """

    steps: LoRASteps
    hidden: Float[Array, "N rows 64"]


def has_adapters(pages: LayerPages | None) -> TypeGuard[LayerPages]:
    """Whether any of the projections has adapters."""
    return pages is not None and bool(pages.modules)


def make_lora_steps(
    plan: RoutingPlan, projections: Sequence[LayerPages | None], tiles: Tiles | None = None
) -> list[LoRASteps | None]:
    """The steps of the plan's tiles for several projections, in one kernel.

    Args:
      plan: as `make_plan` made it.
      projections: the adapters of each projection, or of each two that share their input.
      tiles: others than the plan's.

    Returns:
      For each projection what `grouped_matmul` and `shrink` take as `steps`; None for one without adapters, and for
      all of them where the plan's backend has no use for steps.

    Raises:
      InputError: the plan is one of `forward_plan_and_steps`, which came with its steps.
    """
    if plan.token_tiles is not None:
        raise InputError("This plan came with its steps; give those of forward_plan_and_steps, or make_plan's plan.")
    backend = BACKENDS[plan.backend]
    if not backend.has("lora_steps"):
        return [None] * len(projections)
    return backend.module("lora_steps").make_lora_steps(plan, projections, tiles)


def forward_plan_and_steps(
    plan: RoutingPlan, projections: Sequence[LayerPages | None]
) -> tuple[RoutingPlan, list[LoRASteps | None]]:
    """The plan and the steps for a layer's forward pass, where nothing is differentiated.

    For few tokens a backend may have a plan in which every tile reads all tokens as they are
    (`RoutingPlan.token_tiles`). It is made together with the steps, in one kernel. Under `jit` no result of the first
    plan's kernels is used then, and XLA removes them.

    Args:
      plan: as `make_plan` made it.
      projections: as in `make_lora_steps`.

    Returns:
      The plan to use, for `grouped_matmul` and `combine` alone where it has `token_tiles`; and the steps, as
      `make_lora_steps` returns them.
    """
    backend = BACKENDS[plan.backend]
    if not (backend.has("few_tokens") and (few := backend.module("few_tokens")).runs(plan)):
        return plan, make_lora_steps(plan, projections)
    own, steps = few.plan_and_steps(plan, [pages for pages in projections if has_adapters(pages)])
    remaining = iter(steps)
    return own, [next(remaining) if has_adapters(pages) else None for pages in projections]
