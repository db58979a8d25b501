"""Requests of one generation: checked, padded to a bucket, and decoded step by step."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jax_moe_lora.arguments import INT32, array, host_array, is_array, number, per_prompt, whole
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.errors import InputError
from jax_moe_lora.serving.sampling import Sampling
from pallas_kernels.ops import BASE_SLOT

MIN_PROMPT_BUCKET = 16
Reason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt.

    Attributes:
      token_ids: the new tokens, without the end-of-sequence token.
      error: why the prompt's adapter could not be loaded, where it was asked for (`adapter_errors="return"`).
    """

    text: str
    token_ids: list[int]
    adapter_name: str | None
    finish_reason: Reason
    error: Exception | None = None


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it."""

    token_ids: list[int]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int

    @classmethod
    def make(
        cls, where: str, prompt: Any, encode: Callable[[str], list[int]], config: ModelConfig, **options: Any
    ) -> "Request":
        """A request whose prompt and options are checked; errors call it `where`.

        Raises:
          InputError: what is wrong with it, or that it does not fit the model.
        """
        for name, lowest, highest in (("max_new_tokens", 1, INT32), ("top_k", 0, INT32), ("seed", 0, 2**32 - 1)):
            options[name] = whole(f"{where}: {name}", options[name], lowest, highest)
        for name, holds, expected in (
            ("temperature", lambda t: 0 <= t <= 1e30, "0 (greedy) to 1e30"),
            ("top_p", lambda p: 0 < p <= 1, "more than 0 and at most 1"),
        ):
            options[name] = number(f"{where}: {name}", options[name], holds, expected)
        request = cls(_token_ids(where, prompt, encode), **options)
        request._check_fits(where, config)
        return request

    def _check_fits(self, where: str, config: ModelConfig) -> None:
        if not self.token_ids:
            raise InputError(f"{where} is empty; give at least one token.")
        if min(self.token_ids) < 0 or max(self.token_ids) >= config.vocab_size:
            raise InputError(f"{where} has a token id outside 0 to {config.vocab_size - 1}.")
        if len(self.token_ids) + self.max_new_tokens > config.max_positions:
            raise InputError(
                f"{where} has {len(self.token_ids)} tokens and asks for {self.max_new_tokens} more; "
                f"the model has {config.max_positions} positions; shorten the prompt or ask for fewer."
            )


def _token_ids(where: str, prompt: Any, encode: Callable[[str], list[int]]) -> list[int]:
    if isinstance(prompt, str):
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise InputError(f"{where} holds half of a surrogate pair, which is no text; give valid Unicode.")
        return encode(prompt)
    if is_array(prompt):
        prompt = host_array(prompt).tolist()
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        raise InputError(f"{where} is of type {type(prompt).__name__}; expected a text or a list of token ids.")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise InputError(f"{where} holds {token!r}; expected token ids, which are whole numbers.")
    return [int(token) for token in prompt]


def make_requests(
    prompts: Sequence[Any], encode: Callable[[str], list[int]], config: ModelConfig, **options: Any
) -> list[Request]:
    """The requests of prompts whose options are one value for all, or one a prompt."""
    columns = {name: per_prompt(name, values, len(prompts)) for name, values in options.items()}
    return [
        Request.make(f"Prompt {i}", prompt, encode, config, **{name: column[i] for name, column in columns.items()})
        for i, prompt in enumerate(prompts)
    ]


def check_tokens(token_ids: Any, lengths: Any, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """int32 `[B, T]` right-padded prompts and int32 `[B]` real tokens of each; all T where `lengths` is None."""
    tokens = array("token_ids", token_ids)
    if tokens.ndim != 2 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"token_ids are {tokens.dtype} {list(tokens.shape)}; expected integers [B, T], not empty.")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise InputError(f"token_ids lie outside 0 to {config.vocab_size - 1}.")
    rows, width = tokens.shape
    if width > config.max_positions:
        raise InputError(f"token_ids have {width} tokens a row; the model has {config.max_positions} positions.")
    real = np.full(rows, width) if lengths is None else array("lengths", lengths)
    integers = real.shape == (rows,) and np.issubdtype(real.dtype, np.integer)
    if not integers or real.min() < 0 or real.max() > width:
        raise InputError(f"lengths are {real.tolist()}; expected {rows} whole numbers from 0 to {width}.")
    return tokens.astype(np.int32), real.astype(np.int32)


@dataclass(frozen=True)
class PaddedBatch:
    """Requests padded to a bucket, so that batches of nearby sizes run one program.

    Attributes:
      requests: the real ones; rows: B, with unused rows after them.
      tokens: int32 `[B, T]`, right-padded. lengths: int32 `[B]`, 0 for unused rows.
      cache_length: M, positions that prompts and answers need, rounded up.
    """

    requests: list[Request]
    rows: int
    tokens: np.ndarray
    lengths: np.ndarray
    cache_length: int

    @classmethod
    def make(cls, requests: list[Request], pad_to: tuple[int, int] | None = None) -> "PaddedBatch":
        longest = max(len(request.token_ids) for request in requests)
        if pad_to is not None and not (isinstance(pad_to, Sequence) and len(pad_to) == 2):
            raise InputError(f"pad_to is {pad_to!r}; expected (batch, prompt tokens).")
        rows, width = pad_to or (_bucket(len(requests)), max(MIN_PROMPT_BUCKET, _bucket(longest)))
        rows, width = whole("pad_to's batch", rows, 1), whole("pad_to's prompt tokens", width, 1)
        if rows < len(requests) or width < longest:
            raise InputError(f"pad_to is {pad_to}; {len(requests)} prompts of up to {longest} tokens need more.")
        tokens = np.zeros((rows, width), np.int32)
        lengths = np.zeros(rows, np.int32)
        for row, request in enumerate(requests):
            tokens[row, : len(request.token_ids)] = request.token_ids
            lengths[row] = len(request.token_ids)
        cache_length = _bucket(width + max(request.max_new_tokens for request in requests))
        return cls(requests, rows, tokens, lengths, cache_length)

    @property
    def sampling(self) -> Sampling:
        def column(name: str, dtype: Any, unused: float) -> Any:
            values = [getattr(request, name) for request in self.requests]
            return jnp.asarray(values + [unused] * (self.rows - len(values)), dtype)

        return Sampling(
            column("temperature", jnp.float32, 0.0),
            column("top_k", jnp.int32, 0),
            column("top_p", jnp.float32, 1.0),
            column("seed", jnp.uint32, 0),
        )

    def pad_slots(self, slots: Sequence[int]) -> np.ndarray:
        return np.asarray([*slots, *[BASE_SLOT] * (self.rows - len(slots))], np.int32)


def decode_loop(
    batch: PaddedBatch,
    start: Callable,
    advance: Callable,
    slots: np.ndarray,
    eos_token_ids: Sequence[int],
    stream: Callable[[int, int, list[int], bool], None] | None,
    progress: bool,
    failed: Collection[int] = (),
) -> list[tuple[list[int], Reason]]:
    """Runs the two programs until every request has stopped; returns each one's new tokens and why it stopped.

    Args:
      stream: called with (row, token, new tokens so far, whether it was the last), the end-of-sequence token included.
      failed: rows that are not answered.
    """
    answers: list[list[int]] = [[] for _ in batch.requests]
    reasons: list[Reason | None] = ["error" if row in failed else None for row in range(len(batch.requests))]
    if None not in reasons:
        return [([], "error") for _ in batch.requests]
    device_slots, sampling = jnp.asarray(slots), batch.sampling
    steps = max(request.max_new_tokens for request in batch.requests)
    cache, tokens = start(jnp.asarray(batch.tokens), jnp.asarray(batch.lengths), device_slots, sampling)
    with _bar(progress, steps) as tick:
        for index in range(1, steps + 1):
            # The next step is under way while the host looks at this one's tokens.
            following = (
                advance(cache, tokens, device_slots, sampling, jnp.int32(index)) if index < steps else (cache, tokens)
            )
            _take(np.asarray(tokens), batch.requests, answers, reasons, eos_token_ids, stream)
            tick()
            if None not in reasons:
                break
            cache, tokens = following
    return [(ids, reason or "length") for ids, reason in zip(answers, reasons, strict=True)]


def _take(tokens, requests, answers, reasons, eos_token_ids, stream) -> None:
    for row, request in enumerate(requests):
        if reasons[row] is not None:
            continue
        token = int(tokens[row])
        if token in eos_token_ids:
            reasons[row] = "stop"
        else:
            answers[row].append(token)
            reasons[row] = "length" if len(answers[row]) == request.max_new_tokens else None
        if stream:
            stream(row, token, answers[row], reasons[row] is not None)


def _bucket(size: int) -> int:
    return 1 << (size - 1).bit_length()


@contextmanager
def _bar(show: bool, steps: int) -> Iterator[Callable[[], None]]:
    if not show:
        yield lambda: None
        return
    from rich.progress import Progress  # not needed where nobody watches

    with Progress(transient=True) as bar:
        task = bar.add_task("Generating", total=steps)
        yield lambda: bar.advance(task)
