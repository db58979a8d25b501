"""`jax-moe-lora bench`: the routed layer, over named shapes, adapters and token counts."""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from jax_moe_lora.cli.options import (
    check_implementation,
    command_line,
    console,
    make_folder,
    report_progress,
    result_file,
    write_file,
)
from jax_moe_lora.errors import InputError
from pallas_kernels.specs import ADAPTERS, LAYERS, TOKENS

if TYPE_CHECKING:
    from jax_moe_lora.benchmark.ceilings import Ceilings

PEERS = ("ragged_dot", "tokamax", "torch_grouped_mm", "transformers_peft")


def bench(
    shape: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(LAYERS)}; repeat for more.")] = None,
    adapters: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ADAPTERS)}; repeat for more.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens in the batch; repeat for more.", min=1)] = None,
    routing: Annotated[str, typer.Option(help="uniform, zipf, or quarter (of the experts are hit).")] = "uniform",
    slots: Annotated[str, typer.Option(help="uniform, one (for all tokens), or half-base.")] = "uniform",
    implementation: Annotated[str | None, typer.Option(help="A backend by name; the best one if not given.")] = None,
    quantise: Annotated[
        list[str] | None,
        typer.Option(help="Time the same weights in it too: of fp8, mxfp4, int4 and int4_g128; repeat."),
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"Time it too: of {', '.join(PEERS)}; repeat.")] = None,
    method: Annotated[str, typer.Option(help="loop, queue, or both (twice the compilations): the smaller.")] = "both",
    repeats: Annotated[int, typer.Option(help="Timings, of which the median counts.", min=1)] = 20,
    out: Annotated[
        Path | None,
        typer.Option(help="Writes OUT.csv, OUT.json and OUT.npz (what was drawn), and OUT.png with --plot."),
    ] = None,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="Keep the other cells that OUT.json has. Several runs with one OUT may go together."
        ),
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Needs the plots extra.")] = False,
) -> None:
    """Time the layer with adapters: from x, router weights and expert ids to y, beside its floor.

    A cell that fails is named in the table and in OUT.json, the others are measured, and the exit code is 1. Runs that
    --keep one OUT compile beside each other and take turns on the GPU.
    """
    from jax_moe_lora.benchmark import report
    from jax_moe_lora.benchmark.ceilings import measure_ceilings
    from jax_moe_lora.benchmark.peers import find_peers
    from jax_moe_lora.benchmark.roofline import save_roofline
    from jax_moe_lora.benchmark.sweep import Cells, ThisLibrary, in_turn, sweep

    _check(out, {"plot": plot, "keep": keep}, method, implementation)
    if out is not None:
        make_folder(out)
    turns = out.parent if out and keep else None
    with in_turn(turns):  # of what another run may be writing, and of the ceilings
        if keep and out:
            report.read_earlier(result_file(out, ".json"))  # refused before the work
        head = report.about([])
    names = adapters or ["none", "s8r16"]
    others = find_peers(peer or [], names, lambda line: sys.stderr.write(f"{line}\n"))
    head["versions"] |= report.versions(*(package for other in others for package in other.packages))
    cells = Cells(shape or ["qwen3-30b-a3b"], names, tokens or list(TOKENS), routing, slots)
    rows: list[dict[str, Any]] = []
    all_rows: list[dict[str, Any]] = []
    ours = [ThisLibrary(implementation, scheme) for scheme in (None, *(quantise or ()))]  # type: ignore[arg-type]
    limits = partial(_ceilings, out) if out and keep else measure_ceilings
    for row in sweep(cells, [*ours, *others], repeats, method, turns, limits):  # type: ignore[arg-type]
        rows.append(row)
        report_progress(row)
        if out is not None:  # after each row: a sweep that is cut off keeps what it has
            all_rows = _write(out, rows, head, keep)
    rows = report.compared(rows)
    table = _table(rows)
    table.caption = "\n".join(report.summary(rows))
    console().print(table)
    if plot and out is not None:
        alike = [row for row in all_rows if (row["routing"], row["slots"]) == (routing, slots)]
        title = f"{head['device']}, {head['date']}, routing {routing}, slots {slots}"
        save_roofline(alike, title, result_file(out, ".png"))
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _ceilings(out: Path) -> "Ceilings":
    """Those of the rows that OUT.json has, for one file has one; this run's where there are none yet."""
    from jax_moe_lora.benchmark import report
    from jax_moe_lora.benchmark.ceilings import measure_ceilings

    return report.read_earlier(result_file(out, ".json")).ceilings or measure_ceilings()


def _write(out: Path, rows: list[dict[str, Any]], head: dict[str, Any], keep: bool) -> list[dict[str, Any]]:
    """OUT.csv and OUT.json with these rows, and with `keep` the others that are there by now; returns all."""
    from jax_moe_lora.benchmark import report

    old, commands, ceilings = report.read_earlier(result_file(out, ".json")) if keep else ([], [], None)
    if ceilings:
        head = head | {"ceilings": asdict(ceilings)}
    if len(rows) == 1 or not keep:  # else this run's command is among those that were read
        commands = [*commands, command_line()]
    all_rows = report.compared(report.merge(old, rows))
    write_file(result_file(out, ".csv"), report.write_csv(all_rows))
    write_file(result_file(out, ".npz"), report.write_draws(all_rows))
    write_file(result_file(out, ".json"), report.write_json(all_rows, head | {"commands": commands}))
    return all_rows


def _check(out: Path | None, need_out: dict[str, bool], method: str, implementation: str | None) -> None:
    """Refuses options that cannot be, before the work."""
    for name, given in need_out.items():
        if given and out is None:
            raise InputError(f"--{name} came without --out; give the name that the files start with.")
    if method not in ("both", "loop", "queue"):
        raise InputError(f"--method is {method!r}; expected both, loop or queue.")
    check_implementation(implementation)


def _table(rows: list[dict[str, Any]]) -> Table:
    """`times as fast`: the time of the best peer on the same draw, or of our 16-bit layer, over the row's own."""
    table = Table(
        "shape",
        "adapters",
        "tokens",
        "engine",
        "us",
        "floor",
        "of floor",
        "error",
        title="One layer",
    )
    for title in ("best peer", "times as fast"):
        table.add_column(title)
    for row in rows:
        cells = [row["shape"], row["adapters"], row["tokens"], row["engine"]]
        if "error" in row:
            table.add_row(*map(str, cells), "failed", "", "", row["error"])
            continue
        cells += [row["layer_us"], row["floor_us"], f"{row['floor_us'] / row['layer_us']:.2f}", f"{row['rel_err']:.1e}"]
        if "best_peer" in row:
            cells += [row["best_peer"], f"{row['times_as_fast']:.2f}"]
        table.add_row(*map(str, cells))
    return table
