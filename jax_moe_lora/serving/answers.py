"""Answers that grow token by token: their text, what ends them, and what is streamed of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from jax_moe_lora.serving.requests import Row
from jax_moe_lora.serving.stopping import StopRules

Reason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities where one token was drawn, as the model gave them: before penalties and temperature.

    Attributes:
      token_id: the token.
      logprob: its natural log-probability.
      top: (token id, log-probability) of the most probable tokens, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt.

    Attributes:
      text: without the text that ended it, and without special tokens.
      token_ids: the new tokens, without the token that ended them. The tokens of a stop text are among them.
      adapter_name: None for the base model.
      finish_reason: `stop` (a token or a text that ends it), `length`, or `error`.
      error: why the prompt's adapter could not be loaded, where it was asked for (`adapter_errors="return"`).
      seed: of sampling. `seed=[it]` gives the answer again.
      stop_reason: the stop text or stop token that ended it; None for an end-of-sequence token.
      logprobs: one for each token of `token_ids`, where they were asked for.
      more: the prompt's other answers, where `n` is more than 1.
      routing: int32 `[tokens, L, K]`, where asked for: the experts of L routed layers that each token of the prompt and
        the answer went to. The answer's last token went to none: nothing was drawn after it.
    """

    text: str
    token_ids: list[int]
    adapter_name: str | None
    finish_reason: Reason
    error: Exception | None = None
    seed: int | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    more: tuple["Generation", ...] = ()
    routing: Int[np.ndarray, "tokens L K"] | None = None

    @property
    def samples(self) -> tuple["Generation", ...]:
        """All answers to the prompt, this one first."""
        return (self, *self.more)

    @property
    def message(self) -> dict[str, str]:
        """The answer as a turn of a conversation."""
        return {"role": "assistant", "content": self.text}


@dataclass(frozen=True)
class StreamedToken:
    """What `Model.stream` gives for each token.

    Attributes:
      index: of the prompt.
      sample: which of the prompt's `n` answers it belongs to.
      token_id: the token, which may be one that ends the answer; None where an adapter could not be loaded.
      text: what the answer's text grows by. A character of several tokens arrives with its last one, and what may
        become a stop text is held back. The joined texts are the answer's text.
      logprob: of the token, where asked for.
      is_end: the token ends the answer and is not part of it.
      answer: the whole answer, with its last token; None before.
    """

    index: int
    sample: int
    token_id: int | None
    text: str
    logprob: TokenLogprob | None = None
    is_end: bool = False
    answer: Generation | None = None


class GrowingText:
    """The text of an answer that grows token by token, whole characters at a time, up to a stop text.

    A character may be spread over several tokens; until its last one it decodes as U+FFFD and is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: tuple[str, ...] = ()):
        self._decode, self._stops = decode, stops
        self.text = ""
        self.stopped_by: str | None = None
        self._shown = 0
        self._may_stop_from = 0

    def grow(self, token_ids: Sequence[int], last: bool, may_stop: bool = True) -> None:
        """Takes all tokens so far.

        Args:
          token_ids: of the answer.
          last: no token follows.
          may_stop: False while stop texts do not count yet.
        """
        self.text = self._decode(token_ids)
        if not may_stop:
            self._may_stop_from = len(self.text)
            return
        found = [(at, text) for text in self._stops if (at := self._find(text)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[:at]
        elif not last:
            self.text = self.text.rstrip("\ufffd")

    def news(self, last: bool) -> str:
        """The text beyond what was returned before; what may begin a stop text waits until no token follows."""
        ready = len(self.text) if last else len(self.text) - self._begun()
        new = self.text[self._shown : ready]
        self._shown = max(self._shown, ready)
        return new

    def _find(self, stop: str) -> int:
        """Where a stop text begins that ends behind the part in which none counts."""
        return self.text.find(stop, max(0, self._may_stop_from - len(stop) + 1))

    def _begun(self) -> int:
        """Characters at the end that a stop text may go on from."""
        longest = max(map(len, self._stops), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stops):
                return size
        return 0


class Answer:
    """One answer in the making."""

    def __init__(self, row: Row, stops: StopRules, decode: Callable[[Sequence[int]], str], streamed: bool):
        self.row, self._stops = row, stops
        self._decode, self._streamed = decode, streamed
        self._growing = GrowingText(decode, stops.texts)
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._routing: list[np.ndarray] = []
        self._stop_reason: int | str | None = None
        self.reason: Reason | None = None

    def is_end(self, token: int) -> bool:
        """Whether a token ends the answer without being part of it."""
        return token in self._stops.tokens

    def take(self, token: int, logprob: TokenLogprob | None) -> str:
        """Takes the next token; returns what there is to show of the text."""
        params = self.row.request.params
        if self.is_end(token):
            self.reason, self._stop_reason = "stop", token if token in self._stops.stop_tokens else None
        else:
            self._token_ids.append(token)
            if logprob is not None:
                self._logprobs.append(logprob)
            self.reason = "length" if len(self._token_ids) == params.max_new_tokens else None
        if not (self._streamed or self._stops.texts):
            return ""
        self._growing.grow(self._token_ids, self.reason is not None, len(self._token_ids) >= params.min_new_tokens)
        if self._growing.stopped_by is not None and not self.is_end(token):
            self.reason, self._stop_reason = "stop", self._growing.stopped_by
        return self._growing.news(self.reason is not None)

    def take_routing(self, experts: np.ndarray) -> None:
        """Takes the experts of the tokens that were read before the next one.

        Args:
          experts: int32 `[tokens, L, K]`.
        """
        self._routing.append(experts)

    def generation(self, adapter_name: str | None, error: Exception | None = None) -> Generation:
        """The finished answer."""
        watched = self._streamed or self._stops.texts
        return Generation(
            self._growing.text if watched else self._decode(self._token_ids),
            self._token_ids,
            adapter_name,
            self.reason or "length",
            error,
            self.row.seed,
            self._stop_reason,
            self._logprobs if self.row.request.params.logprobs is not None else None,
            routing=self._read_routing(),
        )

    def _read_routing(self) -> np.ndarray | None:
        """Without the experts of tokens that are not part of the answer."""
        if not self._routing:
            return None
        whole = len(self.row.request.token_ids) + len(self._token_ids)
        return np.concatenate(self._routing)[: max(whole - 1, len(self.row.request.token_ids))]


@dataclass(frozen=True)
class HostScores:
    """`TokenScores` on the host."""

    chosen: np.ndarray
    ids: np.ndarray
    values: np.ndarray

    def of_row(self, row: int, count: int, token: int) -> TokenLogprob:
        """What is said of a row's token, with the `count` most probable ones."""
        pairs = zip(self.ids[row, :count].tolist(), self.values[row, :count].tolist(), strict=True)
        return TokenLogprob(token, float(self.chosen[row]), tuple(pairs))
