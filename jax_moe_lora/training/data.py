"""Training data: the examples of JSONL files, and every line that cannot be trained on by its number."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe_lora.errors import InputError, TrainingDataError
from jax_moe_lora.files.safetensors_io import parse_json
from jax_moe_lora.files.text import decode, jsonl_lines
from jax_moe_lora.training.examples import Encoder, Example
from jax_moe_lora.training.forms import EXPECTED

SHOWN = 10  # bad lines that a message quotes; of the others it gives the number
LONGEST = 300  # characters of a problem

Lines = Path | Sequence[Mapping[str, Any]]
"""A JSONL file, or the objects that its lines would hold."""


@dataclass(frozen=True)
class Dataset:
    """The examples of one file.

    Attributes:
      examples: at least one.
      skipped: bad lines that were left out on request.
      ignored: names of the columns that were ignored on request.
      end_tokens: the special tokens that end its answers.
    """

    examples: tuple[Example, ...]
    skipped: int = 0
    ignored: tuple[str, ...] = ()
    end_tokens: frozenset[int] = frozenset()

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens and of which of them count in the loss."""
        sha = hashlib.sha256()
        for example in self.examples:
            sha.update(np.array(len(example.tokens), "<i8").tobytes())
            sha.update(example.tokens.astype("<i4").tobytes() + example.loss_mask.tobytes())
        return sha.hexdigest()


@dataclass
class BadLines:
    """The lines of all files that cannot be trained on, so that one error names them all."""

    problems: list[str] = field(default_factory=list)

    def add(self, where: str, problem: InputError) -> None:
        """Takes the problem of a line, which errors call `where`."""
        said = " ".join(str(problem).removeprefix(where).split()).rstrip(".")
        self.problems.append(f"{where} {said if len(said) <= LONGEST else said[:LONGEST] + ' …'}")

    def refuse(self) -> None:
        """Raises a `TrainingDataError` that names them, if there are any."""
        if not self.problems:
            return
        count = len(self.problems)
        shown = [*self.problems[:SHOWN], *([f"and {count - SHOWN} more"] if count > SHOWN else [])]
        raise TrainingDataError(
            "\n".join(
                [
                    f"{count} line{'s cannot' if count > 1 else ' cannot'} be trained on:",
                    *(f"  {problem}" for problem in shown),
                    "Correct them, or leave them out with --skip-bad-lines (skip_bad_lines=True). Extra columns are "
                    "ignored with --extra-columns ignore (extra_columns='ignore').",
                ]
            ),
            problems=self.problems,
        )


def read_datasets(sources: Mapping[str, Lines], encoder: Encoder, skip_bad_lines: bool = False) -> dict[str, Dataset]:
    """The examples of every file.

    Args:
      sources: by the name that errors give to lines which come from no file.
      encoder: makes examples of lines.
      skip_bad_lines: leave out lines that cannot be trained on.

    Returns:
      The examples by the name of their source.

    Raises:
      InputError: a file that cannot be read or holds no examples.
      TrainingDataError: lines that cannot be trained on, all of them of all files at once.
    """
    bad, datasets = BadLines(), {}
    for name, lines in sources.items():
        before, ignored = len(bad.problems), set[str]()
        examples = tuple(_examples(name, lines, encoder, bad, ignored))
        datasets[name] = Dataset(
            examples, len(bad.problems) - before, tuple(sorted(ignored)), encoder.end_tokens(examples)
        )
    if not skip_bad_lines:
        bad.refuse()
    for name, dataset in datasets.items():
        if not dataset.examples:
            left = f": all its {dataset.skipped} lines were left out" if dataset.skipped else ""
            raise InputError(
                f"{_called(name, sources[name])} holds no examples{left}; expected lines such as {EXPECTED}."
            )
    return datasets


def _examples(name: str, lines: Lines, encoder: Encoder, bad: BadLines, ignored: set[str]) -> Iterator[Example]:
    for where, line in _lines(name, lines):
        try:
            raw = parse_json(decode(line, where), where, InputError) if isinstance(line, bytes) else line
            examples, columns = encoder.examples(raw)
        except InputError as problem:
            bad.add(where, problem)
        else:
            ignored.update(columns)
            yield from examples


def _lines(name: str, lines: Lines) -> Iterable[tuple[str, Any]]:
    """What errors call each line, and its bytes or its object; empty lines are passed over."""
    called = _called(name, lines)
    if not isinstance(lines, Path):
        return ((f"{called}, example {number}", raw) for number, raw in enumerate(lines, 1))
    return ((f"{called}, line {number}", line) for number, line in jsonl_lines(lines))


def _called(name: str, lines: Lines) -> str:
    return str(lines) if isinstance(lines, Path) else f"The data of {name!r}"
