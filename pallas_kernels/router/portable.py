"""A router's choice in one kernel: the scores' softmax or sigmoid, the K best experts and their weights.

A warp holds a token's scores in registers and takes the best expert K times. XLA takes five kernels for it, of which
one sorts all scores.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mosaic
from pallas_kernels.portable.limits import ROWS
from pallas_kernels.portable.rows import Rows, compiler_params
from pallas_kernels.router.api import Router


def route(
    scores: Float[Array, "T E"],
    bias: Float[Array, "E"] | None,
    choice_bias: bool,
    router: Router,
    row_mask: Bool[Array, "T"] | None = None,
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """Each token's experts, the best first, and of equal ones the lower; and their weights.

    Args:
      scores: float32 `[T, E]`.
      bias: float32 `[E]`, or None.
      choice_bias: the bias counts in the choice alone; else it is part of the scores.
      router: how experts are chosen and weighted; `kernel_runs` of it.
      row_mask: bool `[T]`, False for tokens that get the weight 0, at expert E; None where all are real.

    Returns:
      `(weights float32 [T, K], experts int32 [T, K])`. Where one of a token's scores is NaN, so are its weights.
    """
    tokens, experts = scores.shape
    blocks = pl.cdiv(tokens, ROWS)

    def choose(scores, *refs):
        *others, weights_out, experts_out = refs
        bias_ref, mask_ref = (others.pop(0) if given is not None else None for given in (bias, row_mask))
        first, tile = lax.axis_index("tokens") * ROWS, Rows(experts)
        rows = pl.ds(first, ROWS)
        scores = tile.load_in_bounds(scores, first) if tokens % ROWS else tile.load(scores.at[rows])
        added = 0.0 if bias_ref is None else tile.load_for_each(bias_ref)
        values = _values(tile, scores if choice_bias else scores + added, router.router)
        kept, chosen = _best(tile, values, values + added if choice_bias else values, router.top_k)
        weights = _weights(kept, router)
        if mask_ref is not None:
            real = tile.load_one_of_each(mask_ref.at[rows]) != 0
            weights = [jnp.where(real, weight, 0.0) for weight in weights]
            chosen = [jnp.where(real, expert, experts) for expert in chosen]
        for k, (weight, expert) in enumerate(zip(weights, chosen, strict=True)):
            weights_out[rows, k] = weight
            experts_out[rows, k] = expert

    if row_mask is not None:
        mask = jnp.pad(row_mask.astype(jnp.int32), (0, blocks * ROWS - tokens))
    given = [*([] if bias is None else [bias]), *([] if row_mask is None else [mask])]
    shape = blocks * ROWS, router.top_k
    weights, chosen = mosaic.kernel(
        choose,
        out_type=(jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32)),
        grid=(blocks,),
        grid_names=("tokens",),
        compiler_params=compiler_params(),
    )(scores, *given)
    return weights[:tokens], chosen[:tokens]


def _values(tile: Rows, scores: Float[Array, "4 E"], kind: str) -> Float[Array, "4 E"]:
    """What experts are compared by."""
    if kind in ("softmax_topk", "softmax_bias"):
        shares = jnp.exp(scores - tile.along(scores.max(1)))
        return shares / tile.along(shares.sum(1))
    return 1.0 / (1.0 + jnp.exp(-scores)) if kind == "sigmoid_bias" else scores


def _best(
    tile: Rows, values: Float[Array, "4 E"], for_choice: Float[Array, "4 E"], count: int
) -> tuple[Sequence[Float[Array, "4"]], Sequence[Int[Array, "4"]]]:
    """Values and numbers of the best experts."""
    none = values.shape[1]
    number = tile.columns(jnp.int32)
    nan = jnp.where(values == values, 0.0, jnp.nan).sum(1)  # which a maximum may pass over
    kept, chosen = [], []
    for _ in range(count):
        is_best = for_choice == tile.along(for_choice.max(1))
        expert = jnp.where(is_best, number, none).min(1)
        taken = number == tile.along(expert)
        kept.append(jnp.where(taken, values, 0.0).sum(1) + nan)
        chosen.append(jnp.minimum(expert, none - 1))
        for_choice = jnp.where(taken, -jnp.inf, for_choice)
        number = jnp.where(taken, none, number)  # not once more where all that are left are minus infinity
    return kept, chosen


def _weights(values: Sequence[Float[Array, "4"]], router: Router) -> Sequence[Float[Array, "4"]]:
    if router.router == "topk_softmax":
        shares = [jnp.exp(value - values[0]) for value in values]
        total = sum(shares[1:], shares[0])
        values = [share / total for share in shares]
    if router.renormalize:
        total = sum(values[1:], values[0]) + router.renormalize_eps
        if router.renormalize_floor:
            total = jnp.maximum(total, router.renormalize_floor)
        values = [value / total for value in values]
    return [value * router.scaling for value in values]
