"""`jax-moe-lora validate`: what would stop or change serving an adapter."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from jax_moe_lora.cli.options import AsJson, Dtype, LoraBLayout, console
from jax_moe_lora.files.sizes import format_bytes


def validate(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    model: Annotated[
        Path, typer.Option(help="Folder of the model that is to serve it; its config is read, with --deep its scales.")
    ],
    deep: Annotated[bool, typer.Option("--deep", help="Read the weights too.")] = False,
    max_rank: Annotated[int, typer.Option(min=1, help="Of the bank.")] = 64,
    dtype: Dtype = "bfloat16",
    lora_b_layout: LoraBLayout = None,
    as_json: AsJson = False,
) -> None:
    """Say everything that would stop or change serving an adapter. Exit code 1 with an error. Reads no weights."""
    from jax_moe_lora.tools.validate import validate_folders

    report = validate_folders(adapter, model, deep, max_rank=max_rank, dtype=dtype, lora_b_layout=lora_b_layout)
    if as_json:
        sys.stdout.write(json.dumps(asdict(report), indent=2) + "\n")
    else:
        for finding in report.findings:
            colour = "red" if finding.severity == "error" else "yellow"
            console().print(
                f"[{colour}]{finding.severity}[/]: {escape(finding.message)}", soft_wrap=True, highlight=False
            )
        size = "" if report.bank_bytes is None else f", {format_bytes(report.bank_bytes)} of a {dtype} bank"
        layout = f" ({report.layout}{size})" if report.layout else ""
        warnings = len(report.findings) - len(report.errors)
        sys.stdout.write(f"{adapter}{layout}: {len(report.errors)} errors, {warnings} warnings\n")
    if report.errors:
        raise typer.Exit(1)
