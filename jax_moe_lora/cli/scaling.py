"""`jax-moe-lora scaling`: what a step of a model would cost on a mesh of any size."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from jax_moe_lora.cli.options import MODEL_HELP, AsJson, console
from jax_moe_lora.errors import InputError

if TYPE_CHECKING:
    from jax_moe_lora.mesh.scaling import Prediction

TITLE = "A prediction, not a measurement"


def scaling(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    mesh: Annotated[
        str | None, typer.Option(help="Such as data=2,expert=4,tensor=8: one mesh, layer by layer.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="All meshes of so many GPUs, the fastest first.", min=1)] = None,
    prefill: Annotated[bool, typer.Option("--prefill", help="Prompts in place of a decode step.")] = False,
    batch: Annotated[int, typer.Option(help="Requests, all GPUs together.", min=1)] = 8,
    context: Annotated[
        int, typer.Option(help="Tokens in the cache before a decode step, or of a prompt.", min=1)
    ] = 512,
    cache_length: Annotated[int, typer.Option(help="Positions of the cache; 0 for those of the step.", min=0)] = 0,
    adapters: Annotated[int, typer.Option(help="Loaded adapters.", min=0)] = 8,
    rank: Annotated[int, typer.Option(help="Of each adapter.", min=1)] = 16,
    targets: Annotated[str, typer.Option(help="What the adapters are on: experts, or all.")] = "experts",
    shared_outer: Annotated[bool, typer.Option("--shared-outer", help="Experts share the outer matrices.")] = False,
    weights: Annotated[str, typer.Option(help="bfloat16, or a format such as fp8_block, mxfp4 or int4.")] = "bfloat16",
    interconnect: Annotated[str, typer.Option(help="nvlink, nvlink+infiniband or infiniband.")] = "nvlink+infiniband",
    as_json: AsJson = False,
) -> None:
    """Predict bytes moved, time and memory of one step on H200s, without having them."""
    from jax_moe_lora.benchmark.models import model_config
    from jax_moe_lora.mesh.scaling import Workload, predict, rank_meshes

    if (mesh is None) == (gpus is None):
        raise InputError("Give either --mesh, such as expert=4,tensor=2, or --gpus.")
    config = model_config(model)
    kind: Any = "prefill" if prefill else "decode"
    work = Workload(kind, batch, context, cache_length, adapters, rank, targets, shared_outer, weights)  # type: ignore[arg-type]
    if gpus is not None:
        found = rank_meshes(config, gpus, work, interconnect)
    else:
        assert mesh is not None
        found = [predict(config, mesh, work, interconnect)]
    if as_json:
        sys.stdout.write(json.dumps([_fields(one) for one in found], indent=2) + "\n")
        return
    title = f"{TITLE}: {model}, {kind} of {batch} requests, {adapters} adapters of rank {rank}"
    console().print(_table_of_meshes(found, title) if gpus else _table_of_layers(found[0], title))
    if not any(one.fits for one in found):
        console().print(f"None of them fits: {_missing(found)}.")


def _table_of_layers(one: "Prediction", title: str) -> Table:
    columns = ("layers", "read MB", "multiply-adds", "sums", "summed KB", "device µs", "sums µs", "all ms")
    table = Table("each layer", *columns, title=title)
    for layer in one.layers:
        over = ", ".join("+".join(each.axes) for each in layer.sums)
        total = layer.count * (layer.device_s + layer.sums_s) * 1e3
        cells = [f"{layer.read / 1e6:.1f}", f"{layer.multiplied:.2e}", over, f"{layer.summed_bytes / 1e3:.1f}"]
        times = [f"{layer.device_s * 1e6:.0f}", f"{layer.sums_s * 1e6:.0f}", f"{total:.2f}"]
        table.add_row(layer.name, str(layer.count), *cells, *times)
    table.caption = "\n".join(
        [
            f"Step: {one.step_s * 1e3:.2f} ms, {one.sums_s * 1e3:.2f} of it in sums; {one.tokens_per_s:.0f} tokens/s.",
            f"Each {one.device.name}: {memory_text(one)}{'' if one.fits else ': does not fit'}.",
            *(f"Note: {note}." for note in one.notes),
        ]
    )
    return table


def _table_of_meshes(found: "list[Prediction]", title: str) -> Table:
    table = Table("mesh", "step ms", "sums ms", "tokens/s", "memory of each GPU", "", title=title)
    for one in found:
        times = (f"{one.step_s * 1e3:.2f}", f"{one.sums_s * 1e3:.2f}", f"{one.tokens_per_s:.0f}")
        table.add_row(one.mesh_text, *times, memory_text(one), "; ".join(_remarks(one)))
    return table


def memory_text(one: "Prediction") -> str:
    """What a device holds, in GB.

    Args:
      one: a prediction.
    """
    memory = one.memory
    parts = (f"{name} {nbytes / 1e9:.1f}" for name, nbytes in asdict(memory).items())
    return f"{' + '.join(parts)} = {memory.total / 1e9:.1f} of {one.room / 1e9:.0f} GB"


def _remarks(one: "Prediction") -> list[str]:
    return [*([] if one.fits else ["does not fit"]), *one.notes]


def _missing(found: "list[Prediction]") -> str:
    least = min(found, key=lambda one: one.memory.total)
    return f"{least.mesh_text} needs the least, {memory_text(least)}"


def _fields(one: "Prediction") -> dict[str, Any]:
    """A prediction as JSON, what follows from its fields included."""
    derived = {name: getattr(one, name) for name in ("step_s", "sums_s", "tokens_per_s", "fits")}
    return asdict(one) | derived
