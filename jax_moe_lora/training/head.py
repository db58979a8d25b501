"""The head's losses, with their gradient taken on the way.

Logits over a vocabulary are the largest array of a training step and the head its largest matmul. Here some rows at a
time are multiplied, their loss is taken, and at once what the loss gives for the hidden rows: nothing of the
vocabulary's width is kept for the backward pass, and nothing is multiplied a second time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.training.loss import token_losses
from pallas_kernels.varying import varying_as

HEAD_LOGITS = 2**26  # that many logits at once (256 MiB)


def head_losses(model: ModelParams, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Float32 cross-entropy of each target, in nats; differentiable by `hidden` alone: the model is frozen."""

    @jax.custom_vjp
    def losses(hidden: Array, targets: Array) -> Array:
        return _by_rows(model, lambda rows, target: token_losses(decoder.head(model, rows), target), hidden, targets)

    def forward(hidden: Array, targets: Array) -> tuple[Array, Array]:
        return _by_rows(model, lambda rows, target: _losses_and_gradient(model, rows, target), hidden, targets)

    losses.defvjp(forward, _backward)
    return losses(*varying_as((hidden, targets)))


def _losses_and_gradient(model: ModelParams, hidden: Array, targets: Array) -> tuple[Array, Array]:
    """And what each token's loss gives for its hidden row: through `softmax - one hot`."""
    logits, pull = jax.vjp(lambda rows: decoder.head(model, rows), hidden)
    picked = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    (gradient,) = pull(jax.nn.softmax(logits, axis=-1) - picked)
    return token_losses(logits, targets), gradient


def _backward(gradient: Array, dlosses: Float[Array, "B T"]) -> tuple[Array, None]:
    return (gradient.astype(jnp.float32) * dlosses[..., None]).astype(gradient.dtype), None


def _by_rows(model: ModelParams, of_rows: Callable[[Array, Array], Any], hidden: Array, targets: Array) -> Any:
    """`of_rows` of all rows, or of one after the other where the logits would be too many."""
    if targets.size * model.embedding.shape[0] <= HEAD_LOGITS:
        return of_rows(hidden, targets)
    one = lambda row: jax.tree.map(lambda value: value[0], of_rows(row[0][None], row[1][None]))  # noqa: E731
    return lax.map(one, (hidden, targets))
