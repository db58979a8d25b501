"""`jax-moe-lora demo`: the shipped checkpoint and its adapters, served in one batch."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from jax_moe_lora.cli.options import console, write_file
from jax_moe_lora.files.folders import check_writable


def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    strings: Annotated[int, typer.Option(help="Held-out strings, each given to every adapter.", min=1, max=512)] = 48,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. [default: bfloat16 on a GPU, float32 elsewhere]")
    ] = None,
) -> None:
    """Serve the shipped checkpoint: one batch that mixes all adapters and base rows.

    The exit code is 1 if an answer's share, the bits of the mixed batch or the compilations are not as promised.
    """
    check_writable(json_file)
    from jax_moe_lora.demo.run import load_demo, run_demo
    from jax_moe_lora.devices import require_device

    dtype = dtype or ("bfloat16" if require_device().platform == "gpu" else "float32")
    report, out = run_demo(strings, load_demo(dtype)), console()
    table = Table("prompt", "adapter", "answer", "right", title="One batch, every adapter (first rows)")
    for row in report.rows[: 3 * (1 + len(report.summary["adapters"]))]:
        table.add_row(
            row.prompt, row.adapter or "base model", row.answer, "yes" if row.answer == row.expected else "no"
        )
    out.print(table)
    rates = Table(
        "adapter", "own task", "best of the others' tasks", title="Exact match on strings not seen in training"
    )
    rates.add_row("base model", f"{report.summary['base_accuracy']:.1%}", "")
    for name, figures in report.summary["adapters"].items():
        rates.add_row(name, f"{figures['accuracy']:.1%}", f"{figures['other_tasks']:.1%}")
    out.print(rates)
    out.print("{dtype} on {device}, backend {backend}".format(**report.summary))
    out.print(f"Mixed equals solo, bit for bit: {'yes' if report.summary['mixed_equals_solo'] else 'NO'}")
    out.print(f"Compilations while mixing, unloading and loading again: {report.summary['compilations']}")
    out.print(f"Tokens per second: {report.summary['tokens_per_second']}")
    if json_file is not None:
        write_file(json_file, json.dumps(report.summary, indent=2) + "\n")
    for problem in report.broken:
        out.print(f"Not as promised: {problem}.")
    if report.broken:
        raise typer.Exit(1)
