"""`jax-moe-lora parity`: the routed layer beside plain torch in float32, by kind of adapter and dtype."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from jax_moe_lora.cli.options import AsJson, console
from jax_moe_lora.errors import InputError

if TYPE_CHECKING:
    from jax_moe_lora.parity import Comparison

DTYPES = ("float32", "bfloat16", "float16")
LETTERS = "T,D,F,E,K"


def parity(
    shape: Annotated[
        str, typer.Option(help=f"{LETTERS}: tokens, model width, expert width, experts, experts per token.")
    ] = "32,128,192,8,2",  # widths that the kernels take
    rank: Annotated[int, typer.Option(help="R of the adapters; some have other ranks too.", min=1)] = 8,
    dtype: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(DTYPES)}; repeat. All if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Of tokens, routing, weights and adapters.", min=0)] = 0,
    implementation: Annotated[str | None, typer.Option(help="A backend by name; the best one if not given.")] = None,
    device: Annotated[str | None, typer.Option(help="Of the layer: cpu or gpu; jax's default if not given.")] = None,
    torch_device: Annotated[str, typer.Option(help="Of the torch reference: cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Compare the routed layer with plain torch in float32. Exit code 1 if an error exceeds its dtype's rounding."""
    sizes = _sizes(shape)
    if unknown := sorted({*(dtype or ())} - {*DTYPES}):
        raise InputError(f"--dtype is {unknown[0]!r}; expected some of {', '.join(DTYPES)}.")
    from jax import default_device

    from jax_moe_lora.config import MoEConfig
    from jax_moe_lora.devices import device_named, require_device
    from jax_moe_lora.parity import table
    from pallas_kernels.ops import choose

    tokens, hidden, inner, experts, top_k = sizes
    with default_device(device_named(device) if device else require_device()):
        names = {
            name: choose(implementation, dtype=name, operands=(name,), widths=(hidden, inner)).picked
            for name in dtype or DTYPES
        }
        config = MoEConfig(hidden, inner, experts, top_k)
        rows = table(
            config,
            tokens,
            rank,
            tuple(names),
            seed=seed,
            implementation=implementation,  # type: ignore[arg-type]
            torch_device=torch_device,
        )
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) | {"within": row.within} for row in rows], indent=2) + "\n")
    else:
        chosen = ", ".join(f"{name}: {picked}" for name, picked in names.items())
        _print(rows, f"{LETTERS} = {shape}, rank {rank} ({chosen})")
    if not all(row.within for row in rows):
        raise typer.Exit(1)


def _sizes(shape: str) -> tuple[int, ...]:
    """T, D, F, E and K."""
    parts = shape.split(",")
    if len(parts) != len(LETTERS.split(",")) or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"--shape is {shape!r}; expected {LETTERS} as five whole numbers above zero.")
    return tuple(map(int, parts))


def _print(rows: Sequence["Comparison"], title: str) -> None:
    table = Table("probe", "dtype", title=title)
    for name in ("max |layer|", "max |torch|", "max |difference|", "relative error", "cosine", "within"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.probe,
            row.dtype,
            f"{row.max_result:.4g}",
            f"{row.max_reference:.4g}",
            f"{row.difference.max_abs:.1e}",
            f"{row.difference.relative:.1e}",
            f"{row.difference.cosine:.7f}",
            "yes" if row.within else f"NO: above {row.tolerance:g}",
        )
    out = console()
    out.print(table)
    out.print(f"{sum(row.within for row in rows)} of {len(rows)} errors are within the rounding of their dtype.")
