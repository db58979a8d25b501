"""Evaluation of adapters on examples: the loss, and the share of answers that are right in every token."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.training.adapters import Params
from jax_moe_lora.training.batch import Batch
from jax_moe_lora.training.evaluation import masked
from jax_moe_lora.training.layout import step_layout
from jax_moe_lora.training.loss import token_losses
from jax_moe_lora.training.spec import AdapterSpec
from jax_moe_lora.training.training_bank import training_bank
from pallas_kernels.ops import Implementation

Scores = tuple[Float[Array, "B T"], Bool[Array, "B T"]]


@dataclass(frozen=True)
class Evaluation:
    """The results of an adapter on examples.

    Attributes:
      loss: mean cross-entropy of the targets that count in the loss, in nats.
      exact_match: the share of examples in which each such target is the most probable token, so that greedy decoding
        would write them.
      examples: their number.
    """

    loss: float
    exact_match: float
    examples: int


def make_scoring(
    config: ModelConfig,
    specs: Mapping[str, AdapterSpec],
    implementation: Implementation | None = None,
    mesh: str | Mesh | None = None,
) -> Callable[[Mapping[str, Params], ModelParams, Batch], Scores]:
    """The jitted `score(params, model_params, batch) -> (loss of each target, whether it is the most probable token)`.

    Args:
      config: the model's.
      specs: adapter -> what it trains; the first is slot 0.
      implementation: a backend by name, or None for the best that is available.
      mesh: as in `make_step`.
    """
    layout = step_layout(config, specs, mesh)

    def score(params: Mapping[str, Params], model: ModelParams, batch: Batch) -> Scores:
        batch = masked(batch)
        bank = training_bank(params, specs, layout.sites, config.num_layers)
        rows = batch.tokens, batch.positions, batch.segments, batch.slots
        hidden, _ = decoder.packed_hidden(model, bank, *rows, config=config, implementation=implementation)

        def score_row(row: tuple[Array, Array]) -> tuple[Array, Array]:
            logits, targets = decoder.head(model, row[0][None], config), row[1][None]
            return token_losses(logits, targets)[0], logits.argmax(axis=-1)[0].astype(targets.dtype) == row[1]

        return lax.map(score_row, (hidden, batch.targets))  # the logits of all rows at once would not fit

    return jax.jit(layout.per_device(score, layout.rows))


def evaluate(score: Callable[[Batch], Scores], batches: Iterable[Batch], num_slots: int) -> list[Evaluation | None]:
    """The evaluation of each slot; None for a slot without examples.

    Args:
      score: the loss of each target of a batch, and whether it is the most probable token.
      batches: every example once.
      num_slots: S.
    """
    losses, tokens, examples, exact = (np.zeros(num_slots) for _ in range(4))
    for batch in batches:
        loss, most_probable = (np.asarray(values) for values in score(batch))
        counts = np.asarray(batch.weights) > 0
        segments = np.asarray(batch.segments)
        for row, segment in zip(*np.nonzero(np.diff(segments, axis=1, prepend=0) > 0), strict=True):
            example = segments[row] == segments[row, segment]
            slot, in_loss = int(np.asarray(batch.slots)[row, segment]), example & counts[row]
            losses[slot] += loss[row, in_loss].sum(dtype=np.float64)
            tokens[slot] += in_loss.sum()
            examples[slot] += 1
            exact[slot] += most_probable[row, in_loss].all()
    return [
        Evaluation(float(losses[slot] / tokens[slot]), float(exact[slot] / examples[slot]), int(examples[slot]))
        if examples[slot]
        else None
        for slot in range(num_slots)
    ]
