"""How a prompt is answered: one frozen record of options, checked when it is made. Without jax."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import numpy as np

from jax_moe_lora.arguments import INT32, flag, host_array, is_array, number, per_prompt, suggest_keywords, whole
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.text import check_unicode

FreshSeed = Callable[[], int]
UINT32 = 2**32 - 1
MAX_LOGPROBS = 20
MAX_SAMPLES = 1024
_WHOLE = {"max_new_tokens": (1, INT32), "min_new_tokens": (0, INT32), "top_k": (0, INT32), "n": (1, MAX_SAMPLES)}
_OPTIONAL = {"seed": UINT32, "logprobs": MAX_LOGPROBS}
_NUMBERS = {
    "temperature": (lambda t: 0 <= t <= 1e30, "0 (greedy) to 1e30"),
    "top_p": (lambda p: 0 < p <= 1, "more than 0 and at most 1"),
    "min_p": (lambda p: 0 <= p <= 1, "0 (off) to 1"),
    "repetition_penalty": (lambda r: 0 < r <= 1e6, "more than 0 and at most 1e6; 1 is off"),
    "presence_penalty": (lambda p: -1e6 <= p <= 1e6, "-1e6 to 1e6; 0 is off"),
    "frequency_penalty": (lambda p: -1e6 <= p <= 1e6, "-1e6 to 1e6; 0 is off"),
}


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams` as keyword arguments of `generate` and `stream`.

    Each is one value for all prompts or a list of one per prompt, but for `stop` and `stop_token_ids`, whose lists hold
    for all prompts.
    """

    max_new_tokens: int | Sequence[int]
    min_new_tokens: int | Sequence[int]
    temperature: float | Sequence[float]
    top_k: int | Sequence[int]
    top_p: float | Sequence[float]
    min_p: float | Sequence[float]
    repetition_penalty: float | Sequence[float]
    presence_penalty: float | Sequence[float]
    frequency_penalty: float | Sequence[float]
    seed: int | Sequence[int | None] | None
    n: int | Sequence[int]
    stop: str | Sequence[str]
    stop_token_ids: int | Sequence[int]
    ignore_eos: bool | Sequence[bool]
    logprobs: int | Sequence[int | None] | None
    return_routing: bool | Sequence[bool]


@suggest_keywords
@dataclass(frozen=True)
class SamplingParams:
    """How a prompt is answered. The order of the steps is that of transformers.

    Penalties change the logits first, then `temperature`, `top_k`, `top_p` and `min_p` narrow what is drawn from.

    Attributes:
      max_new_tokens: limit of the answer, in tokens.
      min_new_tokens: the fewest tokens of the answer: until then, tokens that would end it are not drawn, and stop
        texts do not count.
      temperature: the logits are divided by it; 0 takes the most probable token.
      top_k: draw from the k most probable tokens; 0 is off.
      top_p: draw from the smallest set of most probable tokens whose probability reaches p; 1 is off.
      min_p: draw from tokens whose probability is at least this share of the highest; 0 is off.
      repetition_penalty: logits of tokens in the prompt or the answer are divided by it where positive, multiplied
        where negative (CTRL, arXiv:1909.05858); 1 is off.
      presence_penalty: subtracted from the logits of tokens in the answer; 0 is off.
      frequency_penalty: subtracted once for every occurrence of a token in the answer; 0 is off.
      seed: 0 to 2**32 - 1. None draws a fresh one, which is returned with the answer. Where one record serves all
        prompts, the seed of prompt i is derived from this seed and i; prompt 0 uses it as it is.
      n: answers per prompt.
      stop: a text that ends the answer, or several; the answer does not include it.
      stop_token_ids: tokens that end the answer, besides the model's end-of-sequence tokens.
      ignore_eos: end-of-sequence tokens do not end the answer and are part of it.
      logprobs: also return the log-probabilities of each token and of this many most probable ones, 0 to 20. They are
        the model's own, before penalties and temperature. None returns none.
      return_routing: also return the experts that each token went to, for a trainer to replay.

    Raises:
      InputError: a value that is out of range or of another type.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    return_routing: bool = False

    def __post_init__(self):
        checked: dict[str, Any] = {}
        for name, (lowest, highest) in _WHOLE.items():
            checked[name] = whole(name, getattr(self, name), lowest, highest)
        for name, highest in _OPTIONAL.items():
            value = getattr(self, name)
            checked[name] = None if value is None else whole(name, value, 0, highest)
        for name, (holds, expected) in _NUMBERS.items():
            checked[name] = number(name, getattr(self, name), holds, expected)
        for name in ("ignore_eos", "return_routing"):
            checked[name] = flag(name, getattr(self, name))
        checked["stop"], checked["stop_token_ids"] = _texts(self.stop), _token_ids(self.stop_token_ids)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(
                f"min_new_tokens is {self.min_new_tokens}; expected at most {self.max_new_tokens}, max_new_tokens."
            )
        if self.n > 1 and not self.temperature:
            raise InputError(f"n is {self.n} with temperature 0, which gives equal answers; set a temperature.")

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def draw_seed() -> int:
    """A seed that was not used before."""
    return secrets.randbits(32)


def params_of_prompts(
    count: int,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    options: Mapping[str, Any],
    fresh: FreshSeed = draw_seed,
) -> list[SamplingParams]:
    """The options of each prompt, each with a seed.

    Args:
      count: prompts.
      sampling_params: one record for all prompts, or one for each; or
      options: fields of `SamplingParams`, as in `SamplingOptions`.
      fresh: draws a seed for a prompt that comes without one.

    Raises:
      InputError: both forms, another number of values than prompts, or a bad value, by its prompt.
    """
    if sampling_params is not None:
        if options:
            raise InputError(f"sampling_params came together with {', '.join(options)}; give one or the other.")
        shared = isinstance(sampling_params, SamplingParams)
        records = per_prompt("sampling_params", sampling_params, count)
        for record in records:
            if not isinstance(record, SamplingParams):
                raise InputError(
                    f"sampling_params is of type {type(record).__name__}; expected SamplingParams, or one per prompt."
                )
    else:
        seed = options.get("seed")
        shared = seed is None or isinstance(seed, int | np.integer)
        columns = {
            name: [value] * count if name in ("stop", "stop_token_ids") else per_prompt(name, value, count)
            for name, value in options.items()
        }
        records = [_record(row, {name: column[row] for name, column in columns.items()}) for row in range(count)]
    return [_with_seed(record, row if shared else 0, fresh) for row, record in enumerate(records)]


def fold_seed(seed: int, kind: str, index: int) -> int:
    """The seed of prompt or sample `index` under a common seed; that of the first is the seed itself.

    Args:
      seed: 0 to 2**32 - 1.
      kind: `prompt` or `sample`, whose seeds are apart from each other.
      index: 0 and up.
    """
    if not index:
        return seed
    domain = {"prompt": 0, "sample": 1}[kind]
    return int(np.random.SeedSequence((seed, domain, index)).generate_state(1)[0])


def _record(row: int, options: Mapping[str, Any]) -> SamplingParams:
    try:
        return SamplingParams(**options)
    except InputError as error:
        raise InputError(f"Prompt {row}: {error}") from error


def _with_seed(record: SamplingParams, index: int, fresh: FreshSeed) -> SamplingParams:
    seed = fresh() if record.seed is None else fold_seed(record.seed, "prompt", index)
    return replace(record, seed=seed)


def _texts(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"stop is {stop!r}; expected a text that is not empty, or a list of them.")
    for text in texts:
        check_unicode(text, f"stop is {stop!r}, which")
    return tuple(texts)


def _token_ids(ids: Any) -> tuple[int, ...]:
    if is_array(ids):
        ids = host_array(ids).tolist()
    listed = ids if isinstance(ids, Sequence) and not isinstance(ids, str | bytes) else (ids,)
    return tuple(whole("stop_token_ids", token, 0) for token in listed)


NAMES = tuple(field.name for field in fields(SamplingParams))
