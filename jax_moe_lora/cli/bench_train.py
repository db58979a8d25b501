"""`jax-moe-lora bench-train`: one training step of a model of random weights, beside transformers + PEFT."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from jax_moe_lora.cli.options import MODEL_HELP, command_line, console, report_progress, result_file, write_file
from jax_moe_lora.errors import InputError

PEFT = "transformers_peft"


def bench_train(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "qwen3-30b-a3b",
    layers: Annotated[int, typer.Option(help="Layers of the model's width.", min=1)] = 4,
    adapters: Annotated[list[int] | None, typer.Option(help="Adapters trained at once; repeat for more.")] = None,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    batch: Annotated[int, typer.Option(help="Rows.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 1024,
    vocabulary: Annotated[int | None, typer.Option(help="Another one, to time the layers.", min=2)] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"Time it too: {PEFT}.")] = None,
    out: Annotated[Path | None, typer.Option(help="Writes OUT.json, after each case.")] = None,
) -> None:
    """Time one training step: forward, backward and update of adapters on the experts, the base frozen."""
    from jax_moe_lora.benchmark import report, train
    from jax_moe_lora.benchmark.ceilings import measure_ceilings
    from jax_moe_lora.benchmark.models import model_config

    config = model_config(model, layers)
    config = config if vocabulary is None else replace(config, vocab_size=vocabulary)
    engines = {"jax_moe_lora": train.measure}
    for name in peer or []:
        if name != PEFT:
            raise InputError(f"peer is {name!r}; expected {PEFT}.")
        engines[name] = train.measure_peft
    head = report.about([command_line()]) | {"method": train.METHOD}
    if peer:
        head["versions"] |= report.versions("torch", "transformers", "peft")
    rows: list[dict[str, Any]] = []
    for count in adapters or [1, 4]:
        if not 1 <= count <= batch:
            raise InputError(f"adapters is {count}; expected 1 to {batch}, one row each.")
        floor = train.floor_ms(config, rank, batch * length, measure_ceilings())
        for engine, measure in engines.items():
            row: dict[str, Any] = {"model": model, "layers": layers, "engine": engine, "adapters": count, "rank": rank}
            row |= {"batch": batch, "length": length, "vocabulary": config.vocab_size, "floor_ms": round(floor, 2)}
            try:
                row |= measure(config, count, rank, batch, length)
                row["of_floor"] = round(floor / row["ms"], 3)
            except Exception as error:  # of a compiler, a device or a peer: the other cases are worth having
                row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            rows.append(row)
            report_progress(row)
            if out is not None:
                write_file(result_file(out, ".json"), report.write_json(rows, head))
    columns = ("engine", "adapters", "ms", "floor_ms", "of_floor", "peak_gb", "compile_s", "error")
    table = Table(*columns, title=f"A training step, {model}, {layers} layers, {batch} x {length} tokens, rank {rank}")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console().print(table)
    if any("error" in row for row in rows):
        raise typer.Exit(1)
