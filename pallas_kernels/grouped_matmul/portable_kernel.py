"""Grouped matmul by mma.sync, for every GPU from sm_80 on; the adapters' expand is more of K.

A block computes one tile of rows (all of one expert) times one block of output columns. It streams stages of 64
elements of K through a ring in shared memory: the tile's rows, and 64 or 128 rows of each weight. `emit_pipeline` fills
the ring, by cp.async below sm_90 and by TMA from there on, and waits for it; one warpgroup multiplies. After K come the
tile's LoRA steps (see `lora_steps/api.py`) through a second ring, into the same accumulators: the step's H in place of
the rows, four pages of B in place of the weights.

A page is 16 ranks, and mma.sync multiplies 16 elements of K at a time: a page that is not a row's own adds exact zeros,
wherever in a step it lies. The plan aligns each expert's first row to the rows of a tile, so a tile is read and written
whole: the rows that it has too many lie between experts and belong to nobody.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.lora_steps.entries import PAGE_B0, PAGE_B1, PAGES_A_STEP, RANKS
from pallas_kernels.lora_steps.xla import PackedSteps
from pallas_kernels.pages import RANK_PAGE
from pallas_kernels.plan.tiles import Tiles
from pallas_kernels.portable.ring import across, compiler_params, release_stage, staged
from pallas_kernels.portable.tuning import DEPTH, EXPAND_STAGES, PortableConfig


def grouped_matmul(
    x: Float[Array, "Q in"],
    weights: tuple[Float[Array, "E out in"], ...],
    tiles: Tiles,
    config: PortableConfig,
    unit: Callable[[Array, Array], Array] | None = None,
    steps: PackedSteps | None = None,
    hidden: Float[Array, "N rows 64"] | None = None,
    pages: tuple[Float[Array, "_pages 16 out"], ...] = (),
    biases: tuple[Float[Array, "E out"] | None, ...] = (None, None),
) -> Float[Array, "Q out"]:
    """`x[r] @ W[e].T + b[e]`, or `unit` of two such products (gated), for the rows of each tile.

    Args:
      x: rows in sorted order, Q and each tile's first row multiples of `tiles.size`, which is 32 or 64.
      weights: one matrix per expert, or two (gated).
      tiles: the plan's.
      config: how the call is cut; its columns divide the output width.
      unit: the gated unit of two products; None for one product.
      steps: what each LoRA step of the adapters' expand holds; None without adapters.
      hidden: H of each step; None without adapters.
      pages: the pools of B pages, one for each weight; empty without adapters.
      biases: for each weight its bias, or None.

    Returns:
      `[Q, out]` in x's dtype; rows that no tile covers are not written, those between experts hold anything.
    """
    rows, width = x.shape
    out_width, count = weights[0].shape[1], len(weights)
    columns, tile_rows = config.columns, tiles.size
    blocks = out_width // columns
    lora = () if steps is None else (steps.start, steps.entries, hidden, *pages)
    given = [index for index, bias in enumerate(biases[:count]) if bias is not None]

    def body(expert_of, start_of, tile_count, x, *refs):
        weights, refs, out = refs[:count], refs[count:-1], refs[-1]
        lora_refs, bias_of = refs[: len(lora)], dict(zip(given, refs[len(lora) :], strict=True))
        item = lax.axis_index("item")  # blocks of a tile follow one another, so its rows come from L2
        tile, block = lax.div(item, jnp.int32(blocks)), lax.rem(item, jnp.int32(blocks))

        def multiply(_, row_ref, *refs_and_accs):
            *weight_refs, accs = refs_and_accs
            rows = row_ref[...]
            accs = tuple(plgpu.mma(acc, rows, ref.T[...]) for acc, ref in zip(accs, weight_refs, strict=True))
            release_stage()
            return accs

        def expand(accs, step_of, entries, hidden, *pools):
            first = step_of[tile]

            def page_spec(side, q):
                def page(k):
                    return entries[(first + k) * PAGES_A_STEP + q, side], 0, block

                return staged((None, RANK_PAGE, columns), page)

            def multiply(_, hidden_ref, *refs_and_accs):
                *page_refs, accs = refs_and_accs
                h = hidden_ref[...]
                for q in range(PAGES_A_STEP):
                    own = h[:, q * RANK_PAGE : (q + 1) * RANK_PAGE]
                    refs = page_refs[q::PAGES_A_STEP]
                    accs = tuple(plgpu.mma(acc, own, ref[...]) for acc, ref in zip(accs, refs, strict=True))
                release_stage()
                return accs

            return plgpu.emit_pipeline(
                multiply,
                grid=(step_of[tile + 1] - first,),
                in_specs=[
                    staged((None, tile_rows, RANKS), lambda k: (first + k, 0, 0)),
                    *[page_spec(side, q) for side in (PAGE_B0, PAGE_B1)[:count] for q in range(PAGES_A_STEP)],
                ],
                max_concurrent_steps=EXPAND_STAGES,
                init_carry=accs,
            )(hidden, *[pool for pool in pools for _ in range(PAGES_A_STEP)])

        @pl.when(tile < tile_count[0])
        def _():
            expert, row_block = expert_of[tile], lax.div(start_of[tile], jnp.int32(tile_rows))
            accs = plgpu.emit_pipeline(
                multiply,
                grid=(width // DEPTH,),
                in_specs=[
                    staged((tile_rows, DEPTH), lambda k: (row_block, k)),
                    *[staged((columns, DEPTH), lambda k: (block, k))] * count,
                ],
                max_concurrent_steps=config.stages,
                init_carry=(jnp.zeros((tile_rows, columns), jnp.float32),) * count,
            )(x, *[weight.at[expert] for weight in weights])
            if lora_refs:
                accs = expand(accs, *lora_refs)
            some = pl.ds(block * columns, columns)
            for index, bias in bias_of.items():
                vector = plgpu.load(bias.at[expert, some], layout=across(tile_rows, bias.dtype), optimized=False)
                wide = lax.broadcast_in_dim(vector.astype(jnp.float32), (tile_rows, columns), (1,))
                accs = (*accs[:index], accs[index] + wide, *accs[index + 1 :])
            result = accs[0] if unit is None else unit(*accs)
            target = out.at[pl.ds(row_block * tile_rows, tile_rows), some]
            target[...] = result.astype(out.dtype)

    kernel = mosaic.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, out_width), x.dtype),
        grid=(tiles.expert.shape[0] * blocks,),
        grid_names=("item",),
        compiler_params=compiler_params(),
    )
    own_biases = [biases[index] for index in given]
    return kernel(tiles.expert, tiles.start, tiles.count.reshape(-1), x, *weights, *lora, *own_biases)
