"""`jax-moe-lora inspect`: what a folder of a model or an adapter holds."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from jax_moe_lora.adapters.validation.grouping import ranges
from jax_moe_lora.cli.options import AsJson, console
from jax_moe_lora.files.sizes import format_bytes

if TYPE_CHECKING:
    from jax_moe_lora.inspect.folders import AdapterSummary, ModelSummary


def inspect(
    folder: Annotated[Path, typer.Argument(help="A model or an adapter folder.")],
    as_json: AsJson = False,
) -> None:
    """Say what a folder holds: layers, modules, ranks, sharing, bytes. Reads no weights."""
    from jax_moe_lora.inspect.folders import AdapterSummary, inspect_folder

    summary = inspect_folder(folder)
    if as_json:
        sys.stdout.write(json.dumps(asdict(summary), indent=2) + "\n")
        return
    if isinstance(summary, AdapterSummary):
        _print_adapter(summary)
    else:
        _print_model(summary)


def _print_model(summary: "ModelSummary") -> None:
    table = Table("what", "value", title=f"{summary.model_type} model")
    for name, value in asdict(summary).items():
        if name not in ("kind", "model_type", "config", "formats"):
            table.add_row(name.replace("_", " "), format_bytes(value) if name == "nbytes" else str(value))
    for one in summary.formats:
        block = " x ".join(str(size or "all") for size in one.block)
        table.add_row(
            f"in {one.name}",
            f"{one.matrices} matrices, {one.bits} bits, a scale per {block}: {one.parameters} values, "
            f"{format_bytes(one.nbytes)}",
        )
    console().print(table)


def _print_adapter(summary: "AdapterSummary") -> None:
    scale = "alpha / sqrt(rank)" if summary.rank_stabilised else "alpha / rank"
    title = (
        f"LoRA adapter ({summary.layout}): rank {summary.rank}, alpha {summary.alpha:g} (scale {scale}), "
        f"{format_bytes(summary.nbytes)}"
    )
    table = Table("module", "form", "layers", "A", "B", "ranks", "shared", "bytes", title=title)
    for module in summary.modules:
        shown = (module.module, module.form, ranges(module.layers), str(module.shape_a), str(module.shape_b))
        table.add_row(*shown, ", ".join(map(str, module.ranks)), module.shared, format_bytes(module.nbytes))
    console().print(table)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(summary, field).items():
            sys.stdout.write(f"{field}: {pattern} has {value:g}\n")
    for key in summary.other_keys:
        console().print(f"Not understood: {key}")
