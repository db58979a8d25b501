"""`jax-moe-lora` and its commands. Exit code 2 and one sentence on bad input."""

import json
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jax_moe_lora.cli.bench import bench, tune
from jax_moe_lora.cli.bench_load import bench_load
from jax_moe_lora.cli.bench_model import bench_model
from jax_moe_lora.cli.bench_train import bench_train
from jax_moe_lora.cli.convert import convert, merge
from jax_moe_lora.cli.options import write_file
from jax_moe_lora.cli.train import train
from jax_moe_lora.errors import JaxMoELoRAError
from jax_moe_lora.files.folders import check_writable
from jax_moe_lora.files.sizes import format_bytes

# click's class, which newer versions of typer hold a copy of and do not export.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)
# Wide where nobody looks at a terminal, so that tables in logs and pipes keep their words whole.
console = Console(width=None if sys.stdout.isatty() else 160)


def print_version(asked: bool) -> None:
    """Answers `--version`, whatever follows it."""
    if asked:
        sys.stdout.write(f"jax-moe-lora {metadata.version('jax-moe-lora')}\n")
        raise typer.Exit


@app.callback(help=__doc__)
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before the name of a command."""


app.command()(convert)
app.command()(merge)
app.command()(train)
app.command()(bench)
app.command("bench-load")(bench_load)
app.command("bench-model")(bench_model)
app.command("bench-train")(bench_train)
app.command()(tune)


@app.command()
def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")] = None,
    strings: Annotated[int, typer.Option(help="Held-out strings, each given to every adapter.", min=1, max=512)] = 48,
) -> None:
    """Serve the shipped checkpoint: one batch that mixes all adapters and base rows."""
    from jax_moe_lora.demo.run import run_demo

    check_writable(json_file)
    report = run_demo(strings)
    table = Table("prompt", "adapter", "answer", "right", title="One batch, every adapter (first rows)")
    for row in report.rows[: 3 * (1 + len(report.summary["adapters"]))]:
        table.add_row(
            row.prompt, row.adapter or "base model", row.answer, "yes" if row.answer == row.expected else "no"
        )
    console.print(table)
    rates = Table(
        "adapter", "own task", "best of the others' tasks", title="Exact match on strings not seen in training"
    )
    rates.add_row("base model", f"{report.summary['base_accuracy']:.1%}", "")
    for name, figures in report.summary["adapters"].items():
        rates.add_row(name, f"{figures['accuracy']:.1%}", f"{figures['other_tasks']:.1%}")
    console.print(rates)
    console.print(f"Mixed equals solo, bit for bit: {'yes' if report.summary['mixed_equals_solo'] else 'NO'}")
    console.print(f"Compilations while mixing, unloading and loading again: {report.summary['compilations']}")
    console.print(f"Tokens per second: {report.summary['tokens_per_second']}")
    if json_file is not None:
        write_file(json_file, json.dumps(report.summary, indent=2) + "\n")


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Checkpoint folder, or a hub id.")],
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=DIR of an adapter to load; repeat for more.")] = None,
    requests: Annotated[Path | None, typer.Option(help='JSONL of {"prompt", "adapter", ...} lines.')] = None,
    out: Annotated[Path | None, typer.Option(help="JSONL of answers; standard output if not given.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeat for more.")] = None,
    use: Annotated[
        str | None, typer.Option(help="Adapter of the --prompt requests; the base model if not given.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that run together.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    max_rank: Annotated[int, typer.Option(min=1)] = 64,
    adapter_memory: Annotated[str, typer.Option(help="Device memory for adapters.")] = "4GiB",
) -> None:
    """Answer prompts, each with its own adapter, in mixed batches."""
    from jax_moe_lora.cli.generate import Defaults, load_model, read_jobs, run_jobs

    check_writable(out)
    defaults = Defaults(max_new_tokens, temperature, top_k, top_p, seed)
    jobs = read_jobs(requests, prompt or [], use, defaults)
    served = load_model(model, adapter or [], jobs, dtype, max_rank, adapter_memory)
    answers = run_jobs(served, jobs, batch_size, progress=out is not None and sys.stderr.isatty())
    text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    if out is None:
        sys.stdout.write(text)
    else:
        write_file(out, text)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A model or an adapter folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a folder holds: layers, modules, ranks, sharing, bytes. Reads no weights."""
    from jax_moe_lora.inspect.folders import AdapterSummary, inspect_folder

    summary = inspect_folder(folder)
    if as_json:
        sys.stdout.write(json.dumps(asdict(summary), indent=2) + "\n")
        return
    if not isinstance(summary, AdapterSummary):
        table = Table("what", "value", title=f"{summary.model_type} model")
        for name, value in asdict(summary).items():
            if name not in ("kind", "model_type", "config"):
                table.add_row(name.replace("_", " "), format_bytes(value) if name == "nbytes" else str(value))
        console.print(table)
        return
    scale = "alpha / sqrt(rank)" if summary.rank_stabilised else "alpha / rank"
    title = (
        f"LoRA adapter ({summary.layout}): rank {summary.rank}, alpha {summary.alpha:g} (scale {scale}), "
        f"{format_bytes(summary.nbytes)}"
    )
    table = Table("module", "form", "layers", "A", "B", "ranks", "shared", "bytes", title=title)
    for module in summary.modules:
        shown = (module.module, module.form, _ranges(module.layers), str(module.shape_a), str(module.shape_b))
        table.add_row(*shown, ", ".join(map(str, module.ranks)), module.shared, format_bytes(module.nbytes))
    console.print(table)
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(summary, field).items():
            sys.stdout.write(f"{field}: {pattern} has {value:g}\n")
    for key in summary.other_keys:
        console.print(f"Not understood: {key}")


@app.command()
def validate(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    model: Annotated[Path, typer.Option(help="Folder of the model that is to serve it; its config alone is read.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read the weights too.")] = False,
    max_rank: Annotated[int, typer.Option(min=1, help="Of the bank.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say everything that would stop or change serving an adapter. Exit code 1 with an error. Reads no weights."""
    from jax_moe_lora.tools.validate import validate_folders

    report = validate_folders(adapter, model, deep, max_rank=max_rank, dtype=dtype)
    if as_json:
        sys.stdout.write(json.dumps(asdict(report), indent=2) + "\n")
    else:
        for finding in report.findings:
            colour = "red" if finding.severity == "error" else "yellow"
            console.print(
                f"[{colour}]{finding.severity}[/]: {escape(finding.message)}", soft_wrap=True, highlight=False
            )
        size = "" if report.bank_bytes is None else f", {format_bytes(report.bank_bytes)} of a {dtype} bank"
        layout = f" ({report.layout}{size})" if report.layout else ""
        warnings = len(report.findings) - len(report.errors)
        sys.stdout.write(f"{adapter}{layout}: {len(report.errors)} errors, {warnings} warnings\n")
    if report.errors:
        raise typer.Exit(1)


def _ranges(numbers: list[int]) -> str:
    """`[0, 1, 2, 5]` as `0-2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def main() -> None:
    """Entry point: the library's own errors and bad options become one sentence and exit code 2."""
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.Abort:
        code = 1
    except UsageError as error:
        code = refuse(error.format_message())  # type: ignore[attr-defined]
    except JaxMoELoRAError as error:
        code = refuse(str(error))
    except ValueError as error:
        from pallas_kernels.hopper.tuning import TunedFileError  # jax comes with it

        if not isinstance(error, TunedFileError):
            raise
        code = refuse(str(error))
    sys.exit(code)


def refuse(message: str) -> int:
    """Writes one sentence to standard error; the exit code."""
    sys.stderr.write(f"jax-moe-lora: {' '.join(message.split())}\n")
    return 2


if __name__ == "__main__":
    main()
