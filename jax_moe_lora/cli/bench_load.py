"""`jax-moe-lora bench-load`: how long an adapter's loading takes, and what decoding feels of it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from jax_moe_lora.cli.options import MODEL_HELP, command_line, console, make_folder, result_file, write_file


def bench_load(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "qwen3-30b-a3b",
    layers: Annotated[int | None, typer.Option(help="Fewer or more layers than the model has.", min=1)] = None,
    rank: Annotated[int, typer.Option(help="Of the adapters, which are on the routed experts.", min=1)] = 16,
    batch: Annotated[int, typer.Option(help="Requests that decode meanwhile.", min=1)] = 8,
    context: Annotated[int, typer.Option(help="Tokens that each of them has behind it.", min=1)] = 512,
    out: Annotated[Path | None, typer.Option(help="Writes OUT.json.")] = None,
) -> None:
    """Time loading an adapter from host memory: alone, and while a model of random weights decodes."""
    from jax_moe_lora.benchmark import report
    from jax_moe_lora.benchmark.load import METHOD, measure_loads
    from jax_moe_lora.benchmark.models import model_config

    config = model_config(model, layers)
    head = report.about([command_line()]) | {"method": METHOD}
    if out is not None:
        make_folder(out)
    figures = measure_loads(config, rank, batch, context)
    about = {"model": model, "layers": config.num_layers, "rank": rank, "batch": batch, "context": context}
    if out is not None:
        write_file(result_file(out, ".json"), report.write_json([about | figures], head))
    table = Table("", *(column for column in figures["per-expert"]), title=f"{model}, {config.num_layers} layers")
    for name in ("per-expert", "shared-outer"):
        table.add_row(name, *(str(value) for value in figures[name].values()))
    table.caption = (
        f"A decode step alone takes {figures['decode_ms']} ms; a copy runs at {figures['copy_gb_per_s']} GB/s."
    )
    console().print(table)
