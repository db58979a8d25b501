"""What ends an answer: the model's and the adapter's end-of-sequence tokens, and what a request adds to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_moe_lora.errors import AdapterFormatError, InputError
from jax_moe_lora.files.safetensors_io import read_json
from jax_moe_lora.files.text import check_unicode
from jax_moe_lora.files.tokenizer import Tokenizer
from jax_moe_lora.serving.sampling_params import SamplingParams


@dataclass(frozen=True)
class StopRules:
    """What ends an answer.

    Attributes:
      end_tokens: the model's and the adapter's end-of-sequence tokens, unless they are ignored.
      stop_tokens: tokens that the request names.
      texts: texts that end the answer.
    """

    end_tokens: frozenset[int]
    stop_tokens: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()

    @property
    def tokens(self) -> frozenset[int]:
        """All tokens that end the answer."""
        return self.end_tokens | self.stop_tokens


def read_adapter_stops(folder: Path, vocab_size: int) -> StopRules:
    """`eos_token_id` and `stop_strings` of an adapter folder's `generation_config.json`, where it has one.

    Args:
      folder: the adapter's.
      vocab_size: V, above every token id.

    Raises:
      AdapterFormatError: the file is malformed, or has values that are not token ids or texts.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return StopRules(frozenset())
    raw = read_json(file, AdapterFormatError)
    ids, texts = _listed(raw.get("eos_token_id")), _listed(raw.get("stop_strings"))
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise AdapterFormatError(f"{file} has eos_token_id {token!r}; expected 0 to {vocab_size - 1}.")
    for text in texts:
        if not isinstance(text, str) or not text:
            raise AdapterFormatError(f"{file} has {text!r} in stop_strings; expected texts that are not empty.")
        try:
            check_unicode(text, f"{file} has {text!r} in stop_strings, which")
        except InputError as error:
            raise AdapterFormatError(str(error)) from error
    return StopRules(frozenset(ids), texts=tuple(texts))


def stop_rules(
    params: SamplingParams, model_tokens: Sequence[int], adapter: StopRules, tokenizer: Tokenizer | None
) -> StopRules:
    """What ends the answer to one request.

    Args:
      params: the request's.
      model_tokens: the model's end-of-sequence tokens.
      adapter: what its adapter's folder adds.
      tokenizer: the model's; None where no text ends the answer.
    """
    end_tokens = frozenset() if params.ignore_eos else frozenset(model_tokens) | adapter.end_tokens
    texts, tokens = [], set(params.stop_token_ids)
    for text in (*params.stop, *adapter.texts):
        ids = [] if tokenizer is None else tokenizer.encode(text, add_special_tokens=False)
        if tokenizer is not None and len(ids) == 1 and not tokenizer.decode(ids):
            tokens.add(ids[0])  # a special token, which no decoded text shows
        else:
            texts.append(text)
    return StopRules(end_tokens, frozenset(tokens), tuple(texts))


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
