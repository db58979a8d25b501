"""What the layers of one step share: positions, masks, slots and the plan of its dense projections.

Letters: B requests, T tokens of a request, N rows of the step.
"""

from dataclasses import replace
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jax_moe_lora.layer.checks import check_array
from jax_moe_lora.layer.linear import dense_plan
from jax_moe_lora.models.blocks.context import Bank, StepContext
from pallas_kernels.ops import BASE_SLOT, Implementation


def prompt_step(
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    bank: Bank | None,
    implementation: Implementation | None,
) -> StepContext:
    """What the layers need to read right-padded prompts."""
    check_array("tokens", tokens, ("B", "T"), "integers")
    batch, width = tokens.shape
    check_array("lengths", lengths, (batch,), "integers")
    check_array("slots", slots, (batch,), "integers")
    index = jnp.arange(width, dtype=jnp.int32)
    real = index[None, :] < lengths[:, None]
    row_slots = jnp.where(real, slots[:, None], BASE_SLOT).reshape(-1)
    positions = jnp.broadcast_to(index[None, :], (batch, width))
    return make_step("prompt", positions, real, row_slots, bank, implementation)


def packed_step(
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    slots: Int[Array, "B T"],
    bank: Bank | None,
    implementation: Implementation | None,
) -> StepContext:
    """What the layers need to read rows of several examples, as `packed_logits` is given them."""
    real = segments > 0
    row_slots = jnp.where(real, slots, BASE_SLOT).reshape(-1)
    step = make_step("prompt", positions, real, row_slots, bank, implementation)
    return replace(step, segments=segments)


def make_step(
    kind: Literal["prompt", "token", "chunk"],
    positions: Int[Array, "B T"],
    row_mask: Bool[Array, "B T"],
    row_slots: Int[Array, "N"],
    bank: Bank | None,
    implementation: Implementation | None,
    starts: Int[Array, "B"] | None = None,
) -> StepContext:
    """What the layers need of one step.

    Args:
      kind: as in `StepContext`.
      positions: int32 `[B, T]`, each token's place in its row of the cache.
      row_mask: bool `[B, T]`, the tokens that are no padding.
      row_slots: int32 `[N]`, the slot of each token, or of each row where a row has one token.
      bank: the adapters.
      implementation: a backend by name, or None for the best available (static).
      starts: int32 `[B]`, the tokens of each request in the cache; None for none.
    """
    plan = None if bank is None else dense_plan(row_slots, bank.num_slots)
    if starts is None:
        starts = jnp.zeros(positions.shape[0], jnp.int32)
    return StepContext(positions, starts, row_mask, row_slots, plan, None, kind, implementation)
