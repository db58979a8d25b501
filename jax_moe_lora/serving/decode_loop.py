"""The loop that answers one batch: two programs on the device, and the answers that the host builds of their tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jax_moe_lora.models.decoder import Cache
from jax_moe_lora.serving.answers import Answer, HostScores, StreamedToken
from jax_moe_lora.serving.programs import DrawnTokens
from jax_moe_lora.serving.requests import PaddedBatch
from jax_moe_lora.serving.sampling import Sampling, TokenScores


@dataclass(frozen=True)
class Programs:
    """The two programs, with parameters, bank and config put in.

    Attributes:
      start: `(tokens, lengths, slots, sampling) -> (cache, drawn)`.
      advance: `(cache, tokens, slots, sampling, index, counts) -> (cache, drawn)`.
    """

    start: Callable[..., tuple[Cache, DrawnTokens]]
    advance: Callable[..., tuple[Cache, DrawnTokens]]


def decode_loop(
    programs: Programs,
    batch: PaddedBatch,
    answers: Sequence[Answer],
    slots: np.ndarray,
    sampling: Sampling,
    names: Sequence[str | None],
    failed: Mapping[int, Exception],
    progress: bool,
) -> Iterator[StreamedToken]:
    """Runs the two programs until every answer has ended.

    Args:
      programs: what runs.
      batch: the prompts.
      answers: one for each of the batch's rows, empty yet.
      slots: int32 `[B]`.
      sampling: how the rows draw.
      names: the adapter of each prompt.
      failed: by prompt, why its adapter could not be loaded; it is not answered.
      progress: show a progress bar.

    Yields:
      Each token of each answer, step by step; with the last one of an answer, the whole.
    """
    for answer in answers:
        if error := failed.get(answer.row.index):
            answer.reason = "error"
            whole = answer.generation(names[answer.row.index], error)
            yield StreamedToken(answer.row.index, answer.row.sample, None, "", answer=whole)
    steps = max((a.row.request.params.max_new_tokens for a in answers if a.reason is None), default=0)
    if not steps:
        return
    device_slots = jnp.asarray(slots)
    cache, drawn = programs.start(jnp.asarray(batch.tokens), jnp.asarray(batch.lengths), device_slots, sampling)
    with _bar(progress, steps) as tick:
        for step in range(1, steps + 1):
            tokens, scores, experts = drawn.tokens, drawn.scores, drawn.experts
            if step < steps:  # under way while the host looks at this one's tokens
                index = jnp.asarray(np.full(len(slots), step, np.int32))
                cache, drawn = programs.advance(cache, tokens, device_slots, sampling, index, drawn.counts)
            if experts is not None:
                _take_routing(np.asarray(experts), batch.lengths if step == 1 else None, answers)
            yield from _take(np.asarray(tokens), scores, answers, names)
            tick()
            if all(answer.reason is not None for answer in answers):
                return


def _take(
    tokens: np.ndarray, scores: TokenScores | None, answers: Sequence[Answer], names: Sequence[str | None]
) -> Iterator[StreamedToken]:
    """One step's tokens of the answers that have not ended."""
    host = None if scores is None else HostScores(*map(np.asarray, (scores.chosen, scores.ids, scores.values)))
    for number, answer in enumerate(answers):
        if answer.reason is not None:
            continue
        token, wanted = int(tokens[number]), answer.row.request.params.logprobs
        logprob = None if wanted is None or host is None else host.of_row(number, wanted, token)
        text = answer.take(token, logprob)
        whole = None if answer.reason is None else answer.generation(names[answer.row.index])
        yield StreamedToken(answer.row.index, answer.row.sample, token, text, logprob, answer.is_end(token), whole)


def _take_routing(experts: np.ndarray, lengths: np.ndarray | None, answers: Sequence[Answer]) -> None:
    """The experts of the tokens that the last step read; `lengths`: of the prompts, where it read these."""
    for number, answer in enumerate(answers):
        if answer.reason is None and answer.row.request.params.return_routing:
            answer.take_routing(experts[number, : 1 if lengths is None else lengths[number]])


@contextmanager
def _bar(show: bool, steps: int) -> Iterator[Callable[[], None]]:
    if not show:
        yield lambda: None
        return
    from rich.progress import Progress  # not needed where nobody watches

    with Progress(transient=True) as bar:
        task = bar.add_task("Generating", total=steps)
        yield lambda: bar.advance(task)
