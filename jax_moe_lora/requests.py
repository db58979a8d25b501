"""Requests of one generation: checked, padded to a bucket, and decoded step by step."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jax_moe_lora.config import ModelConfig
from jax_moe_lora.errors import InputError
from jax_moe_lora.generate import Sampling
from pallas_kernels import BASE_SLOT

MIN_PROMPT_BUCKET = 16


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt. `token_ids` are the new tokens, without the end-of-sequence token."""

    text: str
    token_ids: list[int]
    adapter_name: str | None
    finish_reason: Literal["stop", "length"]


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
    def make(cls, index: int, prompt: Any, count: int, encode: Callable, *options: Any) -> "Request":
        """Picks the values of prompt `index` out of options that are one value, or one a prompt; checks them."""
        names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
        own = {}
        for name, values in zip(names, options, strict=True):
            if isinstance(values, Sequence | np.ndarray):
                if len(values) != count:
                    raise InputError(f"{name} has {len(values)} values for {count} prompts; give one, or one for each.")
                values = values[index]
            own[name] = values
        request = cls(encode(prompt), **own)
        request._check(index)
        return request

    def _check(self, index: int) -> None:
        wholes = {"max_new_tokens": self.max_new_tokens, "top_k": self.top_k, "seed": self.seed}
        for name, value in wholes.items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise InputError(f"{name} of prompt {index} is {value!r}; expected a whole number.")
        if not self.token_ids:
            raise InputError(f"Prompt {index} is empty; give at least one token.")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens of prompt {index} is {self.max_new_tokens}; expected at least 1.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature of prompt {index} is {self.temperature}; expected 0 (greedy) or more.")
        if self.top_k < 0:
            raise InputError(f"top_k of prompt {index} is {self.top_k}; expected 0 (off) or more.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p of prompt {index} is {self.top_p}; expected more than 0 and at most 1.")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed of prompt {index} is {self.seed}; expected 0 to 2**32 - 1.")


@dataclass(frozen=True)
class Batch:
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
    def make(cls, requests: list[Request], config: ModelConfig, pad_to: tuple[int, int] | None = None) -> "Batch":
        for index, request in enumerate(requests):
            _check_fits(index, request, config)
        longest = max(len(request.token_ids) for request in requests)
        rows, width = pad_to or (_bucket(len(requests)), max(MIN_PROMPT_BUCKET, _bucket(longest)))
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
    batch: Batch,
    start: Callable,
    advance: Callable,
    slots: np.ndarray,
    eos_token_ids: Sequence[int],
    stream: Callable[[int, int, list[int], bool], None] | None,
    progress: bool,
) -> list[tuple[list[int], Literal["stop", "length"]]]:
    """Runs the two programs until every request has stopped; returns each one's new tokens and why it stopped.

    Args:
      stream: called with (row, token, new tokens so far, whether it was the last), the end-of-sequence token included.
    """
    answers: list[list[int]] = [[] for _ in batch.requests]
    reasons: list[Literal["stop", "length"] | None] = [None] * len(batch.requests)
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


def _check_fits(index: int, request: Request, config: ModelConfig) -> None:
    if min(request.token_ids) < 0 or max(request.token_ids) >= config.vocab_size:
        raise InputError(f"Prompt {index} has a token id outside 0 to {config.vocab_size - 1}.")
    needed = len(request.token_ids) + request.max_new_tokens
    if needed > config.max_positions:
        raise InputError(
            f"Prompt {index} has {len(request.token_ids)} tokens and asks for {request.max_new_tokens} more; "
            f"the model has {config.max_positions} positions."
        )


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
