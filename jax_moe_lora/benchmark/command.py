"""`jax-moe-lora bench`: the routed layer, over named shapes, adapters and token counts."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jax_moe_lora.errors import InputError
from pallas_kernels import UnsupportedImplementation, choose
from pallas_kernels.specs import ADAPTERS, LAYERS, TOKENS

PEER = "vllm-0.33.0-triton"


def bench(
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(LAYERS)}; repeat for more.")] = None,
    adapters: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ADAPTERS)}; repeat for more.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens in the batch; repeat for more.", min=1)] = None,
    routing: Annotated[str, typer.Option(help="uniform, zipf, or quarter (of the experts are hit).")] = "uniform",
    implementation: Annotated[str | None, typer.Option(help="A backend by name; the best one if not given.")] = None,
    repeats: Annotated[int, typer.Option(help="Timings, of which the median counts.", min=1)] = 20,
    loop: Annotated[bool, typer.Option(help="Time a loop of dependent layers too, and count the smaller.")] = True,
    out: Annotated[Path | None, typer.Option(help="Writes OUT.csv and OUT.json, and OUT.png with --plot.")] = None,
    peers: Annotated[Path | None, typer.Option(help=f"CSV with these columns; {PEER} is shown beside.")] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Needs the plots extra.")] = False,
) -> None:
    """Time the layer with adapters: from x, router weights and expert ids to y, beside its floor."""
    from jax_moe_lora.benchmark import report
    from jax_moe_lora.benchmark.layer import sweep

    if plot and out is None:
        raise InputError("--plot came without --out; give the name that the files start with.")
    if peers is not None and not peers.is_file():
        raise InputError(f"There is no file {peers}; give a CSV with the columns {', '.join(report.COLUMNS)}.")
    try:
        choose(implementation)
    except UnsupportedImplementation as error:
        raise InputError(str(error)) from error
    known = report.read_peers(peers, PEER) if peers else {}
    rows: list[dict[str, Any]] = []
    shapes, names, counts = shape or ["qwen3-30b-a3b"], adapters or ["none", "s8r16"], tokens or list(TOKENS)
    for row in sweep(shapes, names, counts, routing, implementation, repeats, loop):  # type: ignore[arg-type]
        rows.append(row)
        sys.stderr.write(f"{row}\n")
        if out is not None:  # after each row: a sweep that is cut off keeps what it has
            out.parent.mkdir(parents=True, exist_ok=True)
            out.with_suffix(".csv").write_text(report.write_csv(rows))
            out.with_suffix(".json").write_text(report.write_json(rows, _command()))
    table = Table("shape", "adapters", "tokens", "us", "floor", "of floor", "error", PEER, title="One layer")
    for row in rows:
        peer = known.get((row["shape"], row["tokens"], row["adapters"]))
        cells = [row["shape"], row["adapters"], row["tokens"], row["layer_us"], row["floor_us"]]
        cells += [f"{row['floor_us'] / row['layer_us']:.2f}", f"{row['rel_err']:.1e}", peer or ""]
        table.add_row(*map(str, cells))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if plot and out is not None:
        report.plot(rows, out.with_suffix(".png"))


def _command() -> str:
    """What was typed, without the folders of the machine that it was typed on."""
    return " ".join(["jax-moe-lora", *(Path(word).name if os.sep in word else word for word in sys.argv[1:])])
