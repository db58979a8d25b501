"""`jax-moe-lora bench-model`: decode steps and prefills of a whole model of random weights."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from jax_moe_lora.cli.options import (
    MODEL_HELP,
    Mesh,
    check_implementation,
    command_line,
    console,
    make_folder,
    report_progress,
    result_file,
    write_file,
)
from jax_moe_lora.errors import InputError
from pallas_kernels.specs import ADAPTERS

if TYPE_CHECKING:
    import jax

    from jax_moe_lora.benchmark.random_model import Case
    from jax_moe_lora.models.specs.model import ModelConfig
    from pallas_kernels.ops import Format

PEER = "transformers"


def bench_model(
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "qwen3-30b-a3b",
    layers: Annotated[int | None, typer.Option(help="Fewer or more layers than the model has.", min=1)] = None,
    adapters: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(ADAPTERS)}; repeat for more.")] = None,
    targets: Annotated[str, typer.Option(help="What the adapters are on: experts, or all.")] = "experts",
    decode: Annotated[list[int] | None, typer.Option(help="Requests in a decode step; repeat for more.", min=1)] = None,
    prefill: Annotated[list[str] | None, typer.Option(help="REQUESTSxTOKENS of a prefill; repeat for more.")] = None,
    context: Annotated[int, typer.Option(help="Tokens in the cache before a decode step.", min=1)] = 512,
    cache_length: Annotated[int, typer.Option(help="Positions of the cache of a decode step.", min=2)] = 1024,
    steps: Annotated[int, typer.Option(help="Decode steps before one block.", min=1)] = 64,
    implementation: Annotated[str | None, typer.Option(help="A backend by name; the best one if not given.")] = None,
    quantise: Annotated[str | None, typer.Option(help="Quantise the weights to fp8, mxfp4, int4 or int4_g128.")] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"Time it too, without adapters: {PEER}.")] = None,
    mesh: Mesh = None,
    out: Annotated[Path | None, typer.Option(help="Writes OUT.json, after each case.")] = None,
) -> None:
    """Time a whole model, random weights, adapters mixed in the batch: one decode step, and prefill."""
    from jax_moe_lora.benchmark.models import raw_config
    from jax_moe_lora.models.config_file import parse_model_config

    raw = raw_config(model, layers)
    config = parse_model_config(raw, source=model)
    names = adapters or ["none", "s8r16"]
    if unknown := [name for name in names if name not in ADAPTERS]:
        raise InputError(f"adapters is {unknown[0]!r}; expected one of {', '.join(ADAPTERS)}.")
    if targets not in ("experts", "all"):
        raise InputError(f"targets is {targets!r}; expected experts or all.")
    if unknown := [name for name in peer or [] if name != PEER]:
        raise InputError(f"peer is {unknown[0]!r}; expected {PEER}.")
    if context + steps > cache_length:
        raise InputError(f"context {context} and steps {steps} do not fit into cache-length {cache_length}.")
    check_implementation(implementation)
    if prefill is None and decode is None:
        decode, prefill = [8, 32, 128], ["8x1024"]
    cases = _cases(names, decode or [], [_prompt(text) for text in prefill or []], context, cache_length)
    devices = _devices(mesh, config, cases, _formats(config, quantise, model))
    rows: list[dict[str, Any]] = []
    if out is not None:
        make_folder(out)
    for row in _measure(raw, config, cases, targets, implementation, steps, bool(peer), quantise, devices):
        rows.append({"model": model} | row)
        report_progress(rows[-1])
        if out is not None:  # after each case: a run that is cut off keeps what it has
            write_file(result_file(out, ".json"), _json(rows, bool(peer)))
    _print(rows, f"{model}, {config.num_layers} layers")
    if any("error" in row for row in rows):
        raise typer.Exit(1)


def _cases(
    names: Sequence[str], decode: Sequence[int], prefill: Sequence[tuple[int, int]], context: int, cache_length: int
) -> "list[Case]":
    from jax_moe_lora.benchmark.random_model import Case

    cases = [Case("decode", batch, context, cache_length, name) for name in names for batch in decode]
    return cases + [Case("prefill", batch, length, length, name) for name in names for batch, length in prefill]


def _formats(config: "ModelConfig", quantise: str | None, model: str) -> "dict[str, Format]":
    """What the weights are quantised to, which must divide their widths: path -> format."""
    from jax_moe_lora.models.quantised.schemes import quantised_formats

    return {} if quantise is None else quantised_formats(config, quantise, model)


def _devices(
    mesh: str | None, config: "ModelConfig", cases: "Sequence[Case]", formats: "Mapping[str, Format]"
) -> "jax.sharding.Mesh | None":
    """The mesh, which must divide the model, in whole blocks where it is quantised, and the requests of each case."""
    from jax_moe_lora.mesh.rules import check_blocks, check_mesh, make_mesh
    from jax_moe_lora.mesh.steps import row_multiple

    devices = make_mesh(mesh)
    if devices is None:
        return None
    check_mesh(config, devices)
    check_blocks(config, devices, formats)
    multiple = row_multiple(devices)
    for case in cases:
        if case.batch % multiple:
            raise InputError(
                f"{case.kind} has {case.batch} requests; expected a multiple of {multiple}, the mesh's data."
            )
    return devices


def _measure(
    raw: dict[str, Any],
    config: "ModelConfig",
    cases: "Sequence[Case]",
    targets: str,
    implementation: str | None,
    steps: int,
    peer: bool,
    quantise: str | None,
    mesh: "jax.sharding.Mesh | None",
) -> Iterator[dict[str, Any]]:
    """A row per case. The peer comes first: it gives its memory back, which jax does not."""
    from jax_moe_lora.benchmark.model import sweep
    from jax_moe_lora.benchmark.model_peer import sweep_transformers

    if peer:
        once = {(case.kind, case.batch, case.length): case for case in cases}
        yield from sweep_transformers(raw, list(once.values()), steps)
    for row in sweep(config, cases, targets, implementation, steps, quantise, mesh):  # type: ignore[arg-type]
        yield {"engine": "jax_moe_lora"} | row


def _print(rows: list[dict[str, Any]], title: str) -> None:
    columns = ("engine", "kind", "batch", "length", "adapters", "ms", "floor_ms", "tokens_per_s", "peak_gb", "error")
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    console().print(table)


def _prompt(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise InputError(f"prefill is {text!r}; expected REQUESTSxTOKENS, such as 8x1024.")
    return int(match[1]), int(match[2])


def _json(rows: list[dict[str, Any]], peer: bool) -> str:
    from jax_moe_lora.benchmark import model_peer, report
    from jax_moe_lora.benchmark.model import METHOD

    about = report.about([command_line()]) | {"method": METHOD}
    if peer:
        about |= {"peer_method": model_peer.METHOD}
        about["versions"] |= report.versions("torch", "transformers")
    return report.write_json(rows, about)
