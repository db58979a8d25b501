"""`jax-moe-lora bench-model`: decode steps and prefills of a whole model of random weights."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from jax_moe_lora.cli.options import check_implementation, command_line, console, report_progress, write_file
from jax_moe_lora.errors import InputError
from pallas_kernels.specs import ADAPTERS


def bench_model(
    model: Annotated[str, typer.Option(help="qwen3-30b-a3b, or tiny.")] = "qwen3-30b-a3b",
    layers: Annotated[int | None, typer.Option(help="Fewer or more layers than the model has.", min=1)] = None,
    adapters: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ADAPTERS)}; repeat for more.")] = None,
    targets: Annotated[str, typer.Option(help="What the adapters are on: experts, or all.")] = "experts",
    decode: Annotated[list[int] | None, typer.Option(help="Requests in a decode step; repeat for more.", min=1)] = None,
    prefill: Annotated[list[str] | None, typer.Option(help="REQUESTSxTOKENS of a prefill; repeat for more.")] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache before a decode step.", min=1)] = 512,
    cache_length: Annotated[int, typer.Option(help="Positions of the cache of a decode step.", min=2)] = 1024,
    steps: Annotated[int, typer.Option(help="Decode steps before one block.", min=1)] = 64,
    implementation: Annotated[str | None, typer.Option(help="A backend by name; the best one if not given.")] = None,
    out: Annotated[Path | None, typer.Option(help="Writes OUT.json, after each case.")] = None,
) -> None:
    """Time a whole model, random weights, adapters mixed in the batch: one decode step, and prefill."""
    from jax_moe_lora.benchmark.model import METHOD, sweep
    from jax_moe_lora.benchmark.random_model import Case, model_config

    config = model_config(model, layers)
    names = adapters or ["none", "s8r16"]
    if unknown := [name for name in names if name not in ADAPTERS]:
        raise InputError(f"adapters is {unknown[0]!r}; expected one of {', '.join(ADAPTERS)}.")
    if targets not in ("experts", "all"):
        raise InputError(f"targets is {targets!r}; expected experts or all.")
    if context + steps > cache_length:
        raise InputError(f"context {context} and steps {steps} do not fit into cache-length {cache_length}.")
    check_implementation(implementation)
    prompts = [_prompt(text) for text in (["8x1024"] if prefill is None and decode is None else prefill or [])]
    batches = [8, 32, 128] if prefill is None and decode is None else decode or []
    cases = [Case("decode", batch, context, cache_length, name) for name in names for batch in batches]
    cases += [Case("prefill", batch, length, length, name) for name in names for batch, length in prompts]
    rows: list[dict[str, Any]] = []
    for row in sweep(config, cases, targets, implementation, steps):  # type: ignore[arg-type]
        rows.append({"model": model} | row)
        report_progress(rows[-1])
        if out is not None:  # after each case: a run that is cut off keeps what it has
            out.parent.mkdir(parents=True, exist_ok=True)
            write_file(out.with_suffix(".json"), _json(rows, METHOD))
    columns = ("kind", "batch", "length", "adapters", "ms", "floor_ms", "tokens_per_s", "compile_s", "peak_gb", "error")
    table = Table(*columns, title=f"{model}, {config.num_layers} layers")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console().print(table)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _prompt(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise InputError(f"prefill is {text!r}; expected REQUESTSxTOKENS, such as 8x1024.")
    return int(match[1]), int(match[2])


def _json(rows: list[dict[str, Any]], method: str) -> str:
    from jax_moe_lora.benchmark import report

    return report.write_json(rows, report.about([command_line()]) | {"method": method})
