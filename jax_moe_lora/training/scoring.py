"""Evaluation of adapters on examples: their loss, and how many they get right in every token."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jax_moe_lora.config import ModelConfig
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.training.adapters import Params
from jax_moe_lora.training.batch import Batch
from jax_moe_lora.training.evaluation import masked
from jax_moe_lora.training.loss import token_losses
from jax_moe_lora.training.spec import AdapterSpec
from jax_moe_lora.training.training_bank import training_bank
from pallas_kernels.ops import Implementation

Scores = tuple[Float[Array, "B T"], Bool[Array, "B T"]]


@dataclass(frozen=True)
class Evaluation:
    """What an adapter does on examples.

    Attributes:
      loss: mean cross-entropy of the tokens that count, in nats.
      exact_match: share of examples whose every such token is the likeliest one: greedy decoding would write them.
      examples: how many there were.
    """

    loss: float
    exact_match: float
    examples: int


def make_scoring(
    config: ModelConfig, specs: Mapping[str, AdapterSpec], implementation: Implementation | None = None
) -> Callable[[Mapping[str, Params], ModelParams, Batch], Scores]:
    """The jitted `score(params, model_params, batch) -> (loss of each target, whether it is the likeliest)`."""
    sites = decoder.adapter_sites(config)

    @jax.jit
    def score(params: Mapping[str, Params], model: ModelParams, batch: Batch) -> Scores:
        batch = masked(batch)
        bank = training_bank(params, specs, sites, config.num_layers)
        rows = batch.tokens, batch.positions, batch.segments, batch.slots
        hidden, _ = decoder.packed_hidden(model, bank, *rows, config=config, implementation=implementation)

        def of_row(row: tuple[Array, Array]) -> tuple[Array, Array]:  # logits of all rows would be the largest array
            logits, targets = decoder.head(model, row[0][None]), row[1][None]
            return token_losses(logits, targets)[0], logits.argmax(axis=-1)[0].astype(targets.dtype) == row[1]

        return lax.map(of_row, (hidden, batch.targets))

    return score


def evaluate(score: Callable[[Batch], Scores], batches: Iterable[Batch], num_slots: int) -> list[Evaluation | None]:
    """By slot; None for a slot without examples."""
    losses, tokens, examples, right = (np.zeros(num_slots) for _ in range(4))
    for batch in batches:
        loss, likeliest = (np.asarray(values) for values in score(batch))
        counts = np.asarray(batch.weights) > 0
        segments = np.asarray(batch.segments)
        for row, segment in zip(*np.nonzero(np.diff(segments, axis=1, prepend=0) > 0), strict=True):
            example = segments[row] == segments[row, segment]
            slot, learnt = int(np.asarray(batch.slots)[row, segment]), example & counts[row]
            losses[slot] += loss[row, learnt].sum(dtype=np.float64)
            tokens[slot] += learnt.sum()
            examples[slot] += 1
            right[slot] += likeliest[row, learnt].all()
    return [
        Evaluation(float(losses[slot] / tokens[slot]), float(right[slot] / examples[slot]), int(examples[slot]))
        if examples[slot]
        else None
        for slot in range(num_slots)
    ]
