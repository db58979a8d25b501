"""Training data: JSONL lines as token ids, and every line that cannot be trained on by its number.

A line is `{"prompt": "...", "completion": "..."}`, whose loss counts in the completion alone, or `{"text": "..."}`,
whose loss counts in all but the first token. Both end with the model's end of text.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jax_moe_lora.errors import InputError
from jax_moe_lora.files.safetensors_io import parse_json
from jax_moe_lora.files.tokenizer import Tokenizer

SHOWN = 10  # bad lines that are quoted; of the others the number is said
KNOWN = ({"prompt", "completion"}, {"text"})
FORMS = '{"prompt": "...", "completion": "..."} or {"text": "..."}'
_BOM = b"\xef\xbb\xbf"

Lines = Path | Sequence[Mapping[str, Any]]
"""A JSONL file, or the objects that its lines would hold."""


@dataclass(frozen=True)
class Example:
    """What one line says.

    Attributes:
      tokens: int32 `[N]`, N at least 2: prompt, completion, end of text. learnt: index of the first token whose loss
        counts, at least 1.
    """

    tokens: Int[np.ndarray, "N"]
    learnt: int

    @property
    def width(self) -> int:
        """Positions that it takes in a row: the last token is only ever a target."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Dataset:
    """The examples of one file, at least one. skipped: bad lines that were left out on request."""

    examples: tuple[Example, ...]
    skipped: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of what is trained on: tokens, and which of them count."""
        sha = hashlib.sha256()
        for example in self.examples:
            sha.update(np.array([len(example.tokens), example.learnt], "<i8").tobytes())
            sha.update(example.tokens.astype("<i4").tobytes())
        return sha.hexdigest()


@dataclass(frozen=True)
class Encoder:
    """Makes examples of lines.

    Attributes:
      eos: the token that ends every example; None where the model has none.
      vocab_size: V, above every token id. width: the most positions that an example may take.
    """

    tokenizer: Tokenizer
    eos: int | None
    vocab_size: int
    width: int

    def example(self, raw: Mapping[str, Any]) -> Example:
        """Raises an `InputError` that goes on after the name of the line: `has ...`."""
        _check_fields(raw)
        if "text" in raw:
            before, after = list[int](), self.tokenizer.encode(raw["text"])
        else:
            before, after = self.tokenizer.encode_pair(raw["prompt"], raw["completion"])
            if not before:
                raise InputError('has a prompt without tokens; give {"text": "..."} to learn all of a text')
        if not after:
            raise InputError(f"has a {'text' if 'text' in raw else 'completion'} without tokens")
        tokens = [*before, *after]
        if self.eos is not None and tokens[-1] != self.eos:
            tokens.append(self.eos)
        if len(tokens) < 2:
            raise InputError("has one token, which nothing precedes")
        if len(tokens) - 1 > self.width:
            raise InputError(f"has {len(tokens)} tokens; at most {self.width + 1} fit (--sequence-length {self.width})")
        if max(tokens) >= self.vocab_size:
            raise InputError(f"has token {max(tokens)}, which the model's {self.vocab_size} tokens do not include")
        return Example(np.asarray(tokens, np.int32), max(len(before), 1))


@dataclass
class BadLines:
    """What cannot be trained on, over all files, so that all of it is said at once."""

    number: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, problem: InputError) -> None:
        self.number += 1
        if len(self.first) < SHOWN:
            self.first.append(f"{where} {str(problem).removeprefix(where).strip().rstrip('.')}")

    def refuse(self) -> None:
        """Raises an `InputError` that names the first of them, if there are any."""
        if self.number:
            lines = "1 line" if self.number == 1 else f"{self.number} lines"
            more = f"; and {self.number - SHOWN} more" if self.number > SHOWN else ""
            raise InputError(
                f"{lines} cannot be trained on: {'; '.join(self.first)}{more}. Correct them, or leave them out with "
                "--skip-bad-lines (skip_bad_lines=True)."
            )


def read_datasets(sources: Mapping[str, Lines], encoder: Encoder, skip_bad_lines: bool = False) -> dict[str, Dataset]:
    """The examples of every file.

    Args:
      sources: by the name that errors give to lines which come from no file.

    Raises:
      InputError: a file that cannot be read or holds no examples; all bad lines of all files at once.
    """
    bad, datasets = BadLines(), {}
    for name, lines in sources.items():
        before = bad.number
        examples = tuple(_examples(name, lines, encoder, bad))
        datasets[name] = Dataset(examples, bad.number - before)
    if not skip_bad_lines:
        bad.refuse()
    for name, dataset in datasets.items():
        if not dataset.examples:
            left = f": all its {dataset.skipped} lines were left out" if dataset.skipped else ""
            raise InputError(f"{_called(name, sources[name])} holds no examples{left}; expected lines such as {FORMS}.")
    return datasets


def _examples(name: str, lines: Lines, encoder: Encoder, bad: BadLines) -> Iterator[Example]:
    for where, line in _lines(name, lines):
        try:
            yield encoder.example(_parsed(line, where) if isinstance(line, bytes) else line)
        except InputError as problem:
            bad.add(where, problem)


def _lines(name: str, lines: Lines) -> Iterable[tuple[str, Any]]:
    """What errors call a line, and its bytes or its object; empty lines are none."""
    called = _called(name, lines)
    if not isinstance(lines, Path):
        return ((f"{called}, example {number}", raw) for number, raw in enumerate(lines, 1))
    try:
        content = lines.read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise InputError(f"{lines} cannot be read: {error.strerror or error}.") from error
    split = enumerate(content.split(b"\n"), 1)
    return ((f"{called}, line {number}", line) for number, line in split if line.strip())


def _called(name: str, lines: Lines) -> str:
    return str(lines) if isinstance(lines, Path) else f"The data of {name!r}"


def _parsed(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text at byte {error.start + 1}") from error
    return parse_json(text, where, InputError)


def _check_fields(raw: Any) -> None:
    if not isinstance(raw, Mapping):
        raise InputError(f"is of type {type(raw).__name__}; expected {FORMS}")
    if set(raw) not in KNOWN:
        fields = ", ".join(sorted(map(str, raw))) or "no fields"
        raise InputError(f"has {fields[:200]}; expected {FORMS}")
    for name, text in raw.items():
        if not isinstance(text, str):
            raise InputError(f"has {name} of type {type(text).__name__}; expected text")
        if not text and name != "prompt":
            raise InputError(f"has an empty {name}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"has half a surrogate pair in {name}, which is no text") from error
