"""Requests of one generation: checked, and padded to a bucket."""

import random
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora.adapters.pool.agreement import Agreement
from jax_moe_lora.arguments import array, host_array, is_array, whole
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.messages import ChatPrompt, is_chat
from jax_moe_lora.files.text import check_unicode
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.serving.sampling import LogitAdjustments, Sampling
from jax_moe_lora.serving.sampling_params import FreshSeed, SamplingParams, draw_seed, fold_seed, params_of_prompts
from pallas_kernels.ops import BASE_SLOT

MIN_PROMPT_BUCKET = 16
Encode = Callable[[str | ChatPrompt], list[int]]
Prompt = str | Sequence[int] | ChatPrompt
"""A text, token ids, or a conversation."""


@dataclass(frozen=True)
class Request:
    """One prompt and how to answer it."""

    token_ids: list[int]
    params: SamplingParams

    @classmethod
    def make(cls, where: str, prompt: Any, encode: Encode, config: ModelConfig, params: SamplingParams) -> "Request":
        """A request that fits the model.

        Args:
          where: what errors call it.
          prompt: a text, token ids, or a conversation.
          encode: a text or a conversation to token ids.
          config: the model's.
          params: how to answer it.

        Raises:
          InputError: what is wrong with it, or that it does not fit the model.
        """
        request = cls(_token_ids(where, prompt, encode), params)
        request._check_fits(where, config)
        return request

    def _check_fits(self, where: str, config: ModelConfig) -> None:
        new = self.params.max_new_tokens
        if not self.token_ids:
            raise InputError(f"{where} is empty; give at least one token.")
        for ids, name in ((self.token_ids, "token id"), (self.params.stop_token_ids, "stop token id")):
            if ids and not 0 <= min(ids) <= max(ids) < config.vocab_size:
                raise InputError(f"{where} has a {name} outside 0 to {config.vocab_size - 1}.")
        if len(self.token_ids) + new > config.max_positions:
            raise InputError(
                f"{where} has {len(self.token_ids)} tokens and asks for {new} more; "
                f"the model has {config.max_positions} positions."
            )


def _token_ids(where: str, prompt: Any, encode: Encode) -> list[int]:
    if isinstance(prompt, str):
        check_unicode(prompt, where)
        return encode(prompt)
    if is_chat(prompt):
        try:
            return encode(prompt)
        except InputError as error:
            raise InputError(f"{where} {str(error).rstrip('.')}.") from error
    if is_array(prompt):
        prompt = host_array(prompt).tolist()
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
        raise InputError(
            f"{where} is of type {type(prompt).__name__}; expected a text, messages or a list of token ids."
        )
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise InputError(f"{where} holds {token!r}; expected token ids, which are whole numbers.")
    return [int(token) for token in prompt]


def make_requests(
    prompts: Sequence[Any],
    encode: Encode,
    config: ModelConfig,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    options: Any,
    fresh: FreshSeed,
) -> list[Request]:
    """The requests of prompts; their options as in `params_of_prompts`."""
    params = params_of_prompts(len(prompts), sampling_params, options, fresh)
    return [
        Request.make(f"Prompt {i}", prompt, encode, config, record)
        for i, (prompt, record) in enumerate(zip(prompts, params, strict=True))
    ]


def fresh_seeds(agreement: Agreement) -> FreshSeed:
    """Draws seeds, in all processes the same ones in the same order.

    Args:
      agreement: of the processes.
    """
    if agreement.alone:
        return draw_seed
    return partial(random.Random(agreement.of_first(lambda: str(secrets.randbits(128)))).getrandbits, 32)


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
class Row:
    """One answer in the making: a row of the batch.

    Attributes:
      request: what it answers.
      index: of its prompt. sample: which of the prompt's `n` answers it is.
      seed: its own.
    """

    request: Request
    index: int
    sample: int
    seed: int


def rows_of(requests: Sequence[Request]) -> list[Row]:
    """The `n` rows of each request, side by side."""
    return [
        Row(request, index, sample, fold_seed(request.params.seed or 0, "sample", sample))
        for index, request in enumerate(requests)
        for sample in range(request.params.n)
    ]


@dataclass(frozen=True)
class PaddedBatch:
    """Rows padded to a bucket, so that batches of nearby sizes run one program.

    Attributes:
      rows: the real ones.
      tokens: int32 `[B, T]`, right-padded; unused rows follow the real ones.
      lengths: int32 `[B]`, 0 for unused rows.
      cache_length: M, positions that prompts and answers need, rounded up.
    """

    rows: list[Row]
    tokens: np.ndarray
    lengths: np.ndarray
    cache_length: int

    @classmethod
    def make(
        cls, requests: Sequence[Request], pad_to: tuple[int, int] | None = None, multiple: int = 1
    ) -> "PaddedBatch":
        """The smallest bucket that requests fit into, or the sizes (B, T) of `pad_to`; B rounded up to a multiple."""
        rows, longest = rows_of(requests), max(len(request.token_ids) for request in requests)
        if pad_to is not None and not (isinstance(pad_to, Sequence) and len(pad_to) == 2):
            raise InputError(f"pad_to is {pad_to!r}; expected (batch, prompt tokens).")
        size, width = pad_to or (bucket(len(rows)), max(MIN_PROMPT_BUCKET, bucket(longest)))
        size, width = whole("pad_to's batch", size, 1), whole("pad_to's prompt tokens", width, 1)
        if size < len(rows) or width < longest:
            raise InputError(f"pad_to is {pad_to}; {len(rows)} answers to prompts of up to {longest} tokens need more.")
        size = -(-size // multiple) * multiple
        tokens, lengths = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
        for number, row in enumerate(rows):
            lengths[number] = len(row.request.token_ids)
            tokens[number, : lengths[number]] = row.request.token_ids
        return cls(rows, tokens, lengths, bucket(width + max(request.params.max_new_tokens for request in requests)))

    @property
    def scored(self) -> bool:
        """Whether some row asks for log-probabilities."""
        return any(row.request.params.logprobs is not None for row in self.rows)

    @property
    def routed(self) -> bool:
        """Whether some row asks for the experts of its tokens."""
        return any(row.request.params.return_routing for row in self.rows)

    def sampling(self, stops: Sequence[frozenset[int]], vocabulary: int) -> Sampling:
        """How the rows draw, on the device.

        Args:
          stops: the tokens that end each row's answer.
          vocabulary: V.
        """
        params = [row.request.params for row in self.rows]

        def column(name: str, dtype: Any, unused: float = 0) -> jax.Array:
            return self._column([getattr(record, name) for record in params], dtype, unused)

        adjustments = None
        if any(record.has_penalties or record.min_new_tokens for record in params):
            masks = np.zeros((len(self.lengths), vocabulary), bool)
            for number, ids in enumerate(stops):
                masks[number, list(ids)] = True
            adjustments = LogitAdjustments(
                column("repetition_penalty", jnp.float32, 1),
                column("presence_penalty", jnp.float32),
                column("frequency_penalty", jnp.float32),
                column("min_new_tokens", jnp.int32),
                jnp.asarray(masks),
            )
        return Sampling(
            column("temperature", jnp.float32),
            column("top_k", jnp.int32),
            column("top_p", jnp.float32, 1),
            column("min_p", jnp.float32),
            self._column([row.seed for row in self.rows], jnp.uint32, 0),
            adjustments,
        )

    def slots(self, of_prompts: Sequence[int]) -> np.ndarray:
        """int32 `[B]`: the slot of each row, out of one for each prompt."""
        return np.asarray(self._column([of_prompts[row.index] for row in self.rows], jnp.int32, BASE_SLOT))

    def _column(self, values: Sequence[Any], dtype: Any, unused: float) -> jax.Array:
        return jnp.asarray([*values, *[unused] * (len(self.lengths) - len(values))], dtype)


def bucket(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
