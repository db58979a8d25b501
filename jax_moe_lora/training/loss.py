"""Losses of a batch per slot: each adapter is trained on its own tokens only.

A slot's sum first selects its tokens and then adds them; on a mesh, those of all devices. There are no atomics, so the
bits are the same each time, and a loss that is not finite does not reach other adapters. (Gradients are another
matter: kernels multiply the rows of other adapters by zero, and zero times NaN is NaN.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer.routing import expert_probabilities, route
from jax_moe_lora.models.blocks.partial_sums import total_over_rows


def token_losses(logits: Float[Array, "B T V"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """The cross-entropy of each target.

    Args:
      logits: `[B, T, V]`.
      targets: int32 `[B, T]`.

    Returns:
      float32 `[B, T]`, in nats.
    """
    wide = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(wide, axis=-1) - picked


def slot_sums(values: Float[Array, "*shape"], slots: Int[Array, "*shape"], num_slots: int) -> Float[Array, "S"]:
    """The sum of the values of each slot.

    Args:
      values: of any shape.
      slots: int32 of the same shape; values of a slot outside `0 .. S - 1` are left out.
      num_slots: S.
    """
    here = jnp.where(_of_slot(slots.reshape(-1), num_slots), values.reshape(1, -1), 0.0).sum(axis=1)
    return total_over_rows(here)


def load_balancing(
    scores: tuple[Float[Array, "T E"], ...], slots: Int[Array, "T"], num_slots: int, config: MoEConfig
) -> Float[Array, "S"]:
    """The router's auxiliary loss over each slot's tokens: `E * sum_e f_e * P_e`; 0 for a slot without tokens.

    f_e is the number of choices of expert e per token, and P_e is its mean probability, both over all tokens and
    layers, as in `load_balancing_loss_func` of transformers (Switch Transformer, equations 4 to 6; there f_e is divided
    by K). The router defines which experts are chosen and what a probability is: see `route` and
    `expert_probabilities`.

    Args:
      scores: float32 `[T, E]`, the router's scores of each routed layer.
      slots: int32 `[T]`, outside `0 .. S - 1` for tokens that do not count.
      num_slots: S.
      config: the routed layers' config.
    """
    in_slot = _of_slot(slots, num_slots)[:, :, None]
    experts = scores[0].shape[1]
    chosen_sum = probability_sum = jnp.zeros((num_slots, experts), jnp.float32)
    for layer in scores:
        wide = layer.astype(jnp.float32)
        probabilities = expert_probabilities(wide, config.router)
        chosen = jax.nn.one_hot(route(wide, config)[1], experts, dtype=jnp.float32).sum(axis=1)
        chosen_sum = chosen_sum + jnp.where(in_slot, chosen[None], 0.0).sum(axis=1)
        probability_sum = probability_sum + jnp.where(in_slot, probabilities[None], 0.0).sum(axis=1)
    tokens = in_slot.sum(axis=(1, 2)).astype(jnp.float32)
    chosen_sum, probability_sum, tokens = total_over_rows((chosen_sum, probability_sum, tokens))
    rows = jnp.maximum(tokens, 1.0)[:, None] * len(scores)
    return experts * (chosen_sum / rows * (probability_sum / rows)).sum(axis=1)


def _of_slot(slots: Int[Array, "N"], num_slots: int) -> Bool[Array, "S N"]:
    return slots[None, :] == jnp.arange(num_slots, dtype=slots.dtype)[:, None]
