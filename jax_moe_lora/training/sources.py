"""What a trainer reads: the files of all adapters as rows to train on, and rows to evaluate on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_moe_lora.arguments import sequence
from jax_moe_lora.training.data import Lines, read_datasets
from jax_moe_lora.training.examples import Encoder
from jax_moe_lora.training.rows import Feed, Rows, lay_out, make_feed

Source = str | Path | Sequence[Mapping[str, Any]]
"""A JSONL file, or the objects of its lines."""


@dataclass(frozen=True)
class TrainingData:
    """The data of a run.

    Attributes:
      digests: adapter -> SHA-256 of its examples.
      feed: the batch of each step.
      evaluation: adapter -> rows to evaluate it on, for some of them.
      end_tokens: adapter -> the special tokens that end its answers.
      skipped: source -> bad lines that were left out, where there were any.
      ignored_columns: source -> names of columns that were ignored, where there were any.
    """

    digests: dict[str, str]
    feed: Feed
    evaluation: dict[str, Rows]
    end_tokens: dict[str, frozenset[int]]
    skipped: dict[str, int]
    ignored_columns: dict[str, tuple[str, ...]]

    @property
    def most_rows(self) -> int:
        """The rows of the adapter that has the most."""
        return max(len(adapter.rows) for adapter in self.feed.adapters.values())


def read_training_data(
    data: Mapping[str, Source],
    evaluation: Mapping[str, Source],
    encoder: Encoder,
    *,
    batch_size: int,
    packing: bool,
    seed: int,
    skip_bad_lines: bool,
) -> TrainingData:
    """Reads the files of all adapters.

    Args:
      data: adapter -> what it is trained on.
      evaluation: adapter -> what it is evaluated on, for some of them.
      encoder: makes examples of lines.
      batch_size: rows per update.
      packing: put several examples into a row.
      seed: of the order of the rows.
      skip_bad_lines: leave out lines that cannot be trained on.

    Raises:
      InputError: a file that cannot be read or holds no examples.
      TrainingDataError: lines that cannot be trained on, all of them at once.
    """
    training = {name: _lines(name, source) for name, source in data.items()}
    held_out = {f"{name} (evaluation)": _lines(name, source) for name, source in evaluation.items()}
    datasets = read_datasets({**training, **held_out}, encoder, skip_bad_lines)
    examples = {name: datasets[name] for name in data}
    return TrainingData(
        {name: dataset.digest for name, dataset in examples.items()},
        make_feed(examples, batch_size, encoder.width, packing, seed),
        {
            name: Rows(slot, lay_out(datasets[f"{name} (evaluation)"].examples, encoder.width, packing=True))
            for slot, name in enumerate(data)
            if name in evaluation
        },
        {name: dataset.end_tokens for name, dataset in examples.items()},
        {name: dataset.skipped for name, dataset in datasets.items() if dataset.skipped},
        {name: dataset.ignored for name, dataset in datasets.items() if dataset.ignored},
    )


def _lines(name: str, source: Source) -> Lines:
    return Path(source) if isinstance(source, str | Path) else sequence(f"data of {name!r}", source)
