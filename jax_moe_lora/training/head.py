"""The losses of the output head, whose gradient is computed in the forward pass.

The logits are the largest array of a training step, and the head is its largest matmul. For a few rows at a time, this
file computes the logits, their loss, and the gradient of the loss with respect to the hidden rows. So no array of the
vocabulary's width is kept for the backward pass, and no matmul is repeated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.training.loss import token_losses
from pallas_kernels.varying import varying_as

HEAD_LOGITS = 2**26  # logits computed at once (256 MiB)


def head_losses(
    model: ModelParams, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], config: ModelConfig
) -> Float[Array, "B T"]:
    """The cross-entropy of each target, differentiable with respect to `hidden` only: the model is frozen.

    Args:
      model: its head is used.
      hidden: `[B, T, D]`, the decoder's output.
      targets: int32 `[B, T]`.
      config: the model's.

    Returns:
      float32 `[B, T]`, in nats.
    """

    @jax.custom_vjp
    def losses(hidden: Array, targets: Array) -> Array:
        return _by_rows(
            model, lambda rows, target: token_losses(decoder.head(model, rows, config), target), hidden, targets
        )

    def forward(hidden: Array, targets: Array) -> tuple[Array, Array]:
        return _by_rows(model, lambda rows, target: _losses_and_gradient(model, rows, target, config), hidden, targets)

    losses.defvjp(forward, _backward)
    return losses(*varying_as((hidden, targets)))


def _losses_and_gradient(model: ModelParams, hidden: Array, targets: Array, config: ModelConfig) -> tuple[Array, Array]:
    """The loss of each token, and its gradient with respect to the hidden row, through `softmax - one-hot`."""
    logits, head_gradient = jax.vjp(lambda rows: decoder.head(model, rows, config), hidden)
    picked = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    (gradient,) = head_gradient(jax.nn.softmax(logits, axis=-1) - picked)
    return token_losses(logits, targets), gradient


def _backward(gradient: Array, dlosses: Float[Array, "B T"]) -> tuple[Array, None]:
    return (gradient.astype(jnp.float32) * dlosses[..., None]).astype(gradient.dtype), None


def _by_rows(model: ModelParams, function: Callable[[Array, Array], Any], hidden: Array, targets: Array) -> Any:
    """`function` of all rows at once, or of one row after the other where there would be too many logits."""
    if targets.size * model.embedding.shape[0] <= HEAD_LOGITS:
        return function(hidden, targets)

    def of_one_row(row: tuple[Array, Array]) -> Any:
        return jax.tree.map(lambda value: value[0], function(row[0][None], row[1][None]))

    return lax.map(of_one_row, (hidden, targets))
