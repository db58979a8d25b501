"""`jax-moe-lora tune`: configs of the kernels that are faster on this GPU."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from jax_moe_lora.cli.options import command_line, console
from pallas_kernels.specs import LAYERS, TOKENS


def tune(
    out: Annotated[Path, typer.Option(help="The tuned file; entries of other cells that it has are kept.")],
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(LAYERS)}; repeat for more.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens in the batch; repeat for more.", min=1)] = None,
    adapters: Annotated[list[str] | None, typer.Option(help="All of them count alike; repeat for more.")] = None,
    repeats: Annotated[int, typer.Option(help="Timings, of which the median counts.", min=1)] = 20,
    tiles_only: Annotated[bool, typer.Option("--tiles-only", help="Only rows a tile: half the time.")] = False,
) -> None:
    """Find configs of the kernels that are faster on this GPU than the heuristic's; each is checked, then timed.

    For 16-bit weights: quantised ones run through XLA, which has nothing to tune.
    """
    from jax_moe_lora.benchmark.tune import tune as tune_cells

    table = Table("shape", "tokens", "gate_up, down", "us", "heuristic's", "gain", title="Tuned configs")
    cells = shape or ["qwen3-30b-a3b"], tokens or list(TOKENS), adapters or ["none", "s8r16"]
    log = lambda line: sys.stderr.write(f"{line}\n")  # noqa: E731
    for row in tune_cells(*cells, repeats, tiles_only, out, command_line(), log):
        times = [", ".join(map(str, row[name].values())) for name in ("us", "heuristic_us")]
        table.add_row(row["shape"], str(row["tokens"]), str(row["best"]), *times, f"{row['gain']:.1%}")
        log({**row, "best": str(row["best"])})
    console().print(table)
