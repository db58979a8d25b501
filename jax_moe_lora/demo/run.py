"""`jax-moe-lora demo`: one batch that mixes all adapters and base rows, and what it proves."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax_moe_lora.demo.tasks import MAX_LENGTH, TASKS, data_folder, heldout_strings, prompt
from jax_moe_lora.devices import require_device
from jax_moe_lora.serving.model import Model
from jax_moe_lora.tools.compilations import count_compilations
from pallas_kernels.ops import choose

BASE = "base"
NEW_TOKENS = MAX_LENGTH + 2


@dataclass(frozen=True)
class Promise:
    """What the demo shows of a dtype: shares of held-out strings that are answered right.

    Attributes:
      base: at least this share, by the base model.
      own_task: at least this share, by each adapter on its own task.
      other_tasks: at most this share, by each adapter on another's task.
    """

    base: float
    own_task: float
    other_tasks: float


# The files were trained in float32; the wider steps of bfloat16 may turn an answer that was close.
PROMISES = {
    "float32": Promise(0.95, 0.9, 0.1),
    "float16": Promise(0.95, 0.9, 0.1),
    "bfloat16": Promise(0.9, 0.85, 0.15),
}


@dataclass(frozen=True)
class Row:
    """One request of the demo's mixed batch.

    Attributes:
      prompt: what the model was given.
      adapter: the adapter's name, None for the base model.
      answer: what came.
      expected: the task's answer.
    """

    prompt: str
    adapter: str | None
    answer: str
    expected: str


@dataclass(frozen=True)
class Report:
    """What the demo measured.

    Attributes:
      rows: the requests of the mixed batch.
      summary: what `--json` writes.
      broken: the promises that did not hold, a sentence each; empty if all did.
    """

    rows: list[Row]
    summary: dict[str, Any]
    broken: list[str]


def load_demo(dtype: str = "float32") -> Model:
    """The demo's model with all its adapters loaded.

    Args:
      dtype: of weights, cache and adapters.
    """
    model = Model.from_pretrained(data_folder() / "model", dtype=dtype, max_adapters=8, max_rank=64)
    for folder in sorted((data_folder() / "adapters").iterdir()):
        model.load_adapter(folder, adapter_name=folder.name)
    return model


def run_demo(strings: int = 48, model: Model | None = None) -> Report:
    """Serves held-out strings with every adapter and the base model, all tasks mixed in each batch.

    Args:
      strings: how many.
      model: the demo's model in any dtype, from `load_demo`; one in float32 if None.
    """
    model = model or load_demo()
    dtype = model.params.embedding.dtype.name
    names: list[str | None] = [None, *model.adapters]
    texts = heldout_strings(strings)
    jobs = [(text, name) for text in texts for name in names]
    prompts, adapters = [prompt(text) for text, _ in jobs], [name for _, name in jobs]

    def answer(adapter_names: Sequence[str | None]) -> list[str]:
        return [out.text for out in model.generate(prompts, adapter_names, max_new_tokens=NEW_TOKENS)]

    answer(adapters)  # compiles
    with count_compilations() as count:
        began = time.perf_counter()
        outs = model.generate(prompts, adapters, max_new_tokens=NEW_TOKENS)
        seconds = time.perf_counter() - began
        # Solo, as the mixed batch's own program: the same prompts, every other row without an adapter.
        solo = {name: answer([name if own == name else None for own in adapters]) for name in names}
        # An adapter leaves and comes back while nothing recompiles.
        first = next(iter(model.adapters))
        model.unload_adapter(first)
        model.load_adapter(data_folder() / "adapters" / first, adapter_name=first)
        again = answer(adapters)
    answers = [out.text for out in outs]
    mixed_equals_solo = (
        again == answers
        and all(solo[name][row] == answers[row] for row, name in enumerate(adapters))
        and _bits_equal(model, prompts[: len(names)], adapters[: len(names)])
    )
    tokens = sum(len(out.token_ids) + (out.finish_reason == "stop") for out in outs)
    rates = {name: _rates(jobs, answers, name) for name in names}
    widths = (model.config.moe.expert_width, model.config.hidden_size)
    summary = {
        "dtype": dtype,
        "device": require_device().device_kind,
        "backend": choose(model.implementation, dtype=dtype, widths=widths).picked,
        "adapters": {
            name: {"accuracy": rates[name][name], "other_tasks": _others(rates[name], name)} for name in names if name
        },
        "base_accuracy": rates[None][BASE],
        "mixed_equals_solo": mixed_equals_solo,
        "compilations": count.compilations,
        "tokens_per_second": round(tokens / seconds, 1),
        "strings": strings,
    }
    rows = [Row(p, n, a, TASKS[n or BASE](t)) for (t, n), p, a in zip(jobs, prompts, answers, strict=True)]
    return Report(rows, summary, _broken(summary, PROMISES[dtype]))


def _broken(summary: dict[str, Any], promise: Promise) -> list[str]:
    """The promises that the figures do not keep."""
    figures = [("The base model answers its task", summary["base_accuracy"], promise.base)]
    figures += [
        (f"{name} answers its own task", f["accuracy"], promise.own_task) for name, f in summary["adapters"].items()
    ]
    broken = [f"{what} in {share:.1%}; expected {least:.0%} or more" for what, share, least in figures if share < least]
    broken += [
        f"{name} answers another's task in {f['other_tasks']:.1%}; expected {promise.other_tasks:.0%} or less"
        for name, f in summary["adapters"].items()
        if f["other_tasks"] > promise.other_tasks
    ]
    if not summary["mixed_equals_solo"]:
        broken.append("The mixed batch differs from each row's solo run; expected the same bits")
    if summary["compilations"]:
        broken.append(f"{summary['compilations']} programs were compiled while adapters came and went; expected none")
    return broken


def _rates(jobs: Sequence[tuple[str, str | None]], answers: Sequence[str], name: str | None) -> dict[str, float]:
    """Exact-match rate of one adapter's answers on every task."""
    answered = [(text, answer) for (text, adapter), answer in zip(jobs, answers, strict=True) if adapter == name]
    return {
        task: sum(answer == solve(text) for text, answer in answered) / len(answered) for task, solve in TASKS.items()
    }


def _others(rates: dict[str, float], name: str) -> float:
    return max(rate for task, rate in rates.items() if task != name)


def _bits_equal(model: Model, prompts: Sequence[str], adapters: Sequence[str | None]) -> bool:
    """Whether the mixed batch's logits are those of each row's solo run, bit for bit."""
    encoded = [model.tokenizer.encode(text) for text in prompts]
    lengths = [len(ids) for ids in encoded]
    tokens = [ids + [0] * (max(lengths) - len(ids)) for ids in encoded]
    mixed = model.logits(tokens, list(adapters), lengths)
    for row, name in enumerate(adapters):
        solo = model.logits(tokens, [name if index == row else None for index in range(len(adapters))], lengths)
        if (mixed[row, : lengths[row]] != solo[row, : lengths[row]]).any():
            return False
    return True
