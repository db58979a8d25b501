"""Answers to batches of prompts: at once, token by token, and the programs for them ahead of time."""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Literal, Unpack, get_args

from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.arguments import flag, one_of, sequence, suggest_keywords, whole
from jax_moe_lora.errors import InputError, JaxMoELoRAError
from jax_moe_lora.files.messages import ChatPrompt
from jax_moe_lora.mesh.steps import init_cache, row_multiple
from jax_moe_lora.serving import programs
from jax_moe_lora.serving.answers import Answer, Generation, StreamedToken
from jax_moe_lora.serving.decode_loop import Programs, decode_loop
from jax_moe_lora.serving.requests import MIN_PROMPT_BUCKET, PaddedBatch, Prompt, Request, bucket, make_requests
from jax_moe_lora.serving.runner import ProgramRunner
from jax_moe_lora.serving.sampling_params import SamplingOptions, SamplingParams, params_of_prompts
from jax_moe_lora.serving.stopping import StopRules, read_adapter_stops, stop_rules
from pallas_kernels.ops import BASE_SLOT

AdapterErrors = Literal["raise", "return"]


@suggest_keywords
class TextGeneration(ProgramRunner):
    """What `Model` does with prompts."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapter_names: Sequence[str | None] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        callback: Callable[[int, int, str], None] | None = None,
        progress: bool = False,
        pad_to: tuple[int, int] | None = None,
        adapter_errors: AdapterErrors = "raise",
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]:
        """Answers a batch of prompts, each with its own adapter.

        Args:
          prompts: texts, token ids, or conversations: lists of `{"role", "content"}` messages, which go through the
            checkpoint's chat template.
          adapter_names: one per prompt; `None` and `"__base__"` mean the base model.
          sampling_params: how to answer: one record for all prompts, or one for each.
          callback: called with (index of the prompt, token id, new text) as tokens arrive; the joined texts are the
            answer. A character of several tokens arrives with its last token, an incomplete one with the last of all.
          progress: show a progress bar.
          pad_to: (batch, prompt tokens) to pad to, in place of the smallest bucket. Two batches that are padded alike
            run the same program.
          adapter_errors: what to do when an adapter cannot be loaded, such as a corrupt file. `raise`: no prompt is
            answered. `return`: only the requests that named it get the `error`, and no tokens.
          **options: fields of `SamplingParams`, such as `max_new_tokens=64` or `temperature=0.7`, in place of
            `sampling_params`: one value for all prompts, or a list of one per prompt. The lists of `stop` and
            `stop_token_ids` hold for all prompts.

        Returns:
          One answer for each prompt. Where `n` is more than 1, the others are in its `more`.

        Raises:
          InputError: a bad argument, or a prompt that is empty or too long.
          AdapterNameError: an unknown adapter.
          BankFullError: the batch names more adapters than there are slots that are not pinned.
        """
        if callback is not None and not callable(callback):
            raise InputError(f"callback is of type {type(callback).__name__}; expected a function.")
        progress = flag("progress", progress)
        requests, names = self._requests(prompts, adapter_names, sampling_params, adapter_errors, options)
        if callback is not None and any(request.params.n > 1 for request in requests):
            raise InputError("callback cannot tell several answers to a prompt apart; use stream where n is above 1.")
        if not requests:
            return []
        batch = PaddedBatch.make(requests, pad_to, row_multiple(self.mesh))
        answers: dict[tuple[int, int], Generation] = {}
        for token in self._answer(batch, names, adapter_errors, progress, callback is not None):
            if callback is not None and token.token_id is not None and (token.text or not token.is_end):
                callback(token.index, token.token_id, token.text)
            if token.answer is not None:
                answers[token.index, token.sample] = token.answer
        return [_with_more(answers, index, request.params.n) for index, request in enumerate(requests)]

    def stream(
        self,
        prompts: Sequence[Prompt],
        adapter_names: Sequence[str | None] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        pad_to: tuple[int, int] | None = None,
        adapter_errors: AdapterErrors = "raise",
        **options: Unpack[SamplingOptions],
    ) -> Iterator[StreamedToken]:
        """`for token in model.stream(prompts, names, ...):` answers a batch of prompts token by token.

        Arguments are checked before the first token is asked for. Adapters are held while the loop runs, and given back
        where it ends early.

        Args:
          prompts: as in `generate`.
          adapter_names: as in `generate`.
          sampling_params: as in `generate`.
          pad_to: as in `generate`.
          adapter_errors: as in `generate`.
          **options: as in `generate`.

        Returns:
          The tokens of all prompts as they arrive; the last one of each answer comes with the whole answer.

        Raises:
          InputError: as `generate`.
          AdapterNameError: as `generate`.
          BankFullError: as `generate`.
        """
        requests, names = self._requests(prompts, adapter_names, sampling_params, adapter_errors, options)
        if not requests:
            return iter(())
        batch = PaddedBatch.make(requests, pad_to, row_multiple(self.mesh))
        return self._answer(batch, names, adapter_errors, False, True)

    def compile(
        self,
        batches: Sequence[int],
        lengths: Sequence[int],
        max_new_tokens: int = 64,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> None:
        """Compiles what `generate` runs for batches of these sizes, before the first request comes.

        Sizes are rounded up as `generate` rounds them, to powers of two.

        Args:
          batches: numbers of answers that run together.
          lengths: tokens of the longest prompt.
          max_new_tokens: the largest limit of the batch; prompt and answer together decide the size of the cache.
          sampling_params: which options will be used; one record, or several. Three kinds of options ask for other
            programs than the rest: penalties and `min_new_tokens`, `logprobs`, and `return_routing`. None compiles for
            none of these.

        Raises:
          InputError: a size that is not a whole number, or that the model has no positions for.
        """
        limit = whole("max_new_tokens", max_new_tokens, 1, self.config.max_positions)
        rows, widths = (
            [whole(name, size, 1) for size in sequence(name, sizes)]
            for name, sizes in (("batches", batches), ("lengths", lengths))
        )
        given = SamplingParams() if sampling_params is None else sampling_params
        records = [given] if isinstance(given, SamplingParams) else list(sequence("sampling_params", given))
        for size, width, record in product(rows, widths, params_of_prompts(len(records), records, {})):
            params = replace(record, max_new_tokens=limit, min_new_tokens=min(record.min_new_tokens, limit), n=1)
            prompt = Request.make("The prompt to compile for", [0] * width, lambda prompt: [], self.config, params)
            sizes = bucket(size), max(MIN_PROMPT_BUCKET, bucket(width))
            batch = PaddedBatch.make([prompt], sizes, row_multiple(self.mesh))
            with closing(self._answer(batch, [None], "raise", False, False)) as tokens:
                next(tokens)

    def _requests(
        self, prompts: Any, adapter_names: Any, sampling_params: Any, adapter_errors: Any, options: Any
    ) -> tuple[list[Request], list[str | None]]:
        """Checked requests, and the adapter of each."""
        with self._agreement.all_or_none(lambda: (requests, names, adapter_errors)):
            one_of("adapter_errors", adapter_errors, get_args(AdapterErrors))
            prompts = sequence("prompts", prompts)
            requests = make_requests(prompts, self._encode, self.config, sampling_params, options, self._fresh_seed)
            if any(request.params.stop for request in requests) and not self._has_tokenizer:
                raise InputError("stop holds texts, and this model has no tokenizer; give stop_token_ids.")
            names = [None if name == "__base__" else name for name in self._names(adapter_names, len(requests))]
        return requests, names

    def _answer(
        self,
        batch: PaddedBatch,
        names: Sequence[str | None],
        adapter_errors: AdapterErrors,
        progress: bool,
        streamed: bool,
    ) -> Generator[StreamedToken]:
        """Runs a batch while its adapters are held."""
        with self._pool.hold(names) as outcomes:
            outcomes, stops = self._stop_rules(batch, names, outcomes)
            slots, failed = _sort_out(outcomes, adapter_errors)
            answers = [Answer(row, rules, self._decode, streamed) for row, rules in zip(batch.rows, stops, strict=True)]
            cache = init_cache(self.config, len(batch.lengths), batch.cache_length, self._dtype, self.mesh)
            run = Programs(
                partial(self._run, programs.start, cache, scored=batch.scored, routed=batch.routed),
                partial(self._run, programs.advance, scored=batch.scored, routed=batch.routed),
            )
            sampling = batch.sampling([rules.tokens for rules in stops], self.config.vocab_size)
            yield from decode_loop(run, batch, answers, batch.slots(slots), sampling, names, failed, progress)

    def _stop_rules(
        self, batch: PaddedBatch, names: Sequence[str | None], outcomes: Sequence[int | Exception]
    ) -> tuple[list[int | Exception], list[StopRules]]:
        """What ends each row's answer; and the outcomes, with why an adapter's own rules could not be read."""
        adapters: dict[str | None, StopRules] = {}
        errors: dict[str | None, Exception] = {}
        for name in dict.fromkeys(names):
            try:
                adapters[name] = self._adapter_stops(name)
            except JaxMoELoRAError as error:
                adapters[name], errors[name] = StopRules(frozenset()), error
        eos = self.config.eos_token_ids
        tokenizer = self.tokenizer if self._has_tokenizer else None
        rules = [stop_rules(row.request.params, eos, adapters[names[row.index]], tokenizer) for row in batch.rows]
        return [errors.get(name, outcome) for name, outcome in zip(names, outcomes, strict=True)], rules

    def _adapter_stops(self, name: str | None) -> StopRules:
        source = self._pool.source(name)
        if source is None or isinstance(source, LoRAAdapter):
            return StopRules(frozenset())
        with self._agreement.all_or_none(lambda: (sorted(rules.end_tokens), rules.texts)):
            rules = read_adapter_stops(source, self.config.vocab_size)
            if rules.texts and not self._has_tokenizer:
                raise InputError(f"{source} has stop_strings, and this model has no tokenizer; give stop_token_ids.")
        return rules

    def _encode(self, prompt: str | ChatPrompt) -> list[int]:
        return self.tokenizer.encode_prompt(prompt)

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids) if self._has_tokenizer else ""


def _with_more(answers: Mapping[tuple[int, int], Generation], index: int, count: int) -> Generation:
    """The first answer to a prompt, with the others in it."""
    first, *more = (answers[index, sample] for sample in range(count))
    return replace(first, more=tuple(more))


def _sort_out(outcomes: Sequence[int | Exception], adapter_errors: str) -> tuple[list[int], dict[int, Exception]]:
    """The slot of each request, and by its index why one has none; such a row is a base row that nobody reads."""
    failed = {index: slot for index, slot in enumerate(outcomes) if isinstance(slot, Exception)}
    if failed and adapter_errors == "raise":
        raise next(iter(failed.values()))
    return [BASE_SLOT if isinstance(slot, Exception) else slot for slot in outcomes], failed
