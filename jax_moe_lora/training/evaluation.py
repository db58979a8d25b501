"""The losses of a batch, for training and for evaluation.

Training calls the model here only: the adapters' params become a bank, and the rows go through the decoder.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.training.adapters import Params
from jax_moe_lora.training.batch import Batch
from jax_moe_lora.training.head import head_losses
from jax_moe_lora.training.layout import StepLayout, step_layout
from jax_moe_lora.training.loss import load_balancing, slot_sums
from jax_moe_lora.training.spec import AdapterSpec
from jax_moe_lora.training.training_bank import training_bank
from pallas_kernels.ops import BASE_SLOT, Implementation
from pallas_kernels.pytrees import pytree


@pytree
@dataclass(frozen=True)
class Losses:
    """The losses of a batch by slot, in the order of the specs; all are 0 for an adapter that is not in the batch.

    Attributes:
      loss: float32 `[S]`, the mean cross-entropy of the adapter's targets, in nats.
      router: float32 `[S]`, the router's loss without its coefficient; 0 where it is off.
      weight: float32 `[S]`, the sum of the weights of the adapter's targets.
      tokens: float32 `[S]`, the number of the adapter's tokens, prompts included.
    """

    loss: Float[Array, "S"]
    router: Float[Array, "S"]
    weight: Float[Array, "S"]
    tokens: Float[Array, "S"]


@pytree
@dataclass(frozen=True)
class Totals:
    """The divisors of a whole batch's means, by slot.

    Attributes:
      weight: float32 `[S]`, the sum of the weights of the adapter's targets.
      tokens: float32 `[S]`, the number of the adapter's tokens.
    """

    weight: Float[Array, "S"]
    tokens: Float[Array, "S"]

    @classmethod
    def of(cls, batch: Batch, num_slots: int) -> "Totals":
        """The totals of a batch for S slots."""
        ones = jnp.ones(batch.slots.shape, jnp.float32)
        return cls(slot_sums(batch.weights, batch.slots, num_slots), slot_sums(ones, batch.slots, num_slots))


def make_evaluation(
    config: ModelConfig,
    specs: Mapping[str, AdapterSpec],
    implementation: Implementation | None = None,
    mesh: str | Mesh | None = None,
) -> Callable[[Mapping[str, Params], ModelParams, Batch], Losses]:
    """The jitted `evaluate(params, model_params, batch) -> losses`, which changes nothing.

    Losses are means over the batch. Weighted by `weight`, they give the mean over many batches.

    Args:
      config: the model's.
      specs: adapter -> what it trains; the first is slot 0.
      implementation: a backend by name, or None for the best that is available.
      mesh: as in `make_step`.

    Raises:
      InputError: a spec that the model cannot train, or a mesh that does not divide the model.
    """
    layout = step_layout(config, specs, mesh)
    evaluate = layout.per_device(losses_of(layout, specs, False, implementation), P())

    @jax.jit
    def run(params: Mapping[str, Params], model: ModelParams, batch: Batch) -> Losses:
        batch = masked(batch)
        return evaluate(params, model, batch, Totals.of(batch, len(specs)))

    return run


def losses_of(
    layout: StepLayout,
    specs: Mapping[str, AdapterSpec],
    keep_scores: bool,
    implementation: Implementation | None,
    remat: bool = False,
) -> Callable[[Mapping[str, Params], ModelParams, Batch, Totals], Losses]:
    """`evaluate(params, model_params, part, totals)`: a part's share of the losses of the whole batch.

    Args:
      layout: of the step that it is a part of.
      specs: adapter -> what it trains; the first is slot 0.
      keep_scores: also compute the router's loss.
      implementation: a backend by name, or None for the best that is available.
      remat: compute gate and up again in the backward pass.
    """
    config = layout.config

    def evaluate(params: Mapping[str, Params], model: ModelParams, part: Batch, totals: Totals) -> Losses:
        bank = training_bank(params, specs, layout.sites, config.num_layers)
        hidden, routing = decoder.packed_hidden(
            model,
            bank,
            part.tokens,
            part.positions,
            part.segments,
            part.slots,
            config=config,
            packed=part.packed,
            keep_routing=keep_scores,
            remat=remat,
            chosen=part.routing,
            implementation=implementation,
        )
        part_totals = Totals.of(part, len(specs))
        losses = head_losses(model, hidden, part.targets, config) * part.weights
        mean = slot_sums(losses, part.slots, len(specs)) / jnp.where(totals.weight > 0, totals.weight, 1.0)
        router = jnp.zeros_like(mean)
        if routing:
            scores = tuple(layer.scores for layer in routing)
            share = part_totals.tokens / jnp.maximum(totals.tokens, 1.0)
            router = load_balancing(scores, part.slots.reshape(-1), len(specs), config.moe) * share
        return Losses(mean, router, part_totals.weight, part_totals.tokens)

    return evaluate


def masked(batch: Batch) -> Batch:
    """The batch with its padding at `BASE_SLOT` and of weight 0, whatever it had before."""
    real = batch.segments > 0
    return replace(batch, slots=jnp.where(real, batch.slots, BASE_SLOT), weights=jnp.where(real, batch.weights, 0.0))
