"""What commands have in common: options and their parts, the console, and the files that options name."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jax_moe_lora.errors import InputError
from jax_moe_lora.files.folders import whole_file, writing_to

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
MODEL_HELP = (
    "One of qwen3-30b-a3b, qwen3-235b-a22b, deepseek-v3, gpt-oss-20b, qwen3.5-35b-a3b and tiny, or a folder with a "
    "config.json."
)
Mesh = Annotated[
    str | None,
    typer.Option(help="Devices to split the model over, such as data=2,expert=4 (also: tensor)."),
]
Quantise = Annotated[
    str | None,
    typer.Option(help="Quantise a 16-bit model while it is loaded, to fp8, mxfp4, int4 or int4_g128."),
]
Distributed = Annotated[
    bool,
    typer.Option(
        "--distributed",
        help="This is one of several processes with the same options, of which one prints. Slurm, Kubernetes or MPI "
        "say who the others are, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
    ),
]
StartSeconds = Annotated[int, typer.Option(min=1, help="How long --distributed waits for the other processes.")]
LoraBLayout = Annotated[
    str | None,
    typer.Option(
        help="Order of B's columns in 3-D experts, where the file does not say it: rank_major (PEFT) or "
        "grouped_by_expert (Unsloth before 2026-09-17)."
    ),
]


def result_file(out: Path, ending: str) -> Path:
    """A file of results beside others of its name, which may hold dots; an ending of results in it is replaced.

    Args:
      out: what the option says, such as `results/qwen3.5` or `results/qwen3.5.json`.
      ending: `.json`, `.csv` or `.png`.
    """
    name = out.stem if out.suffix in (".json", ".csv", ".png") else out.name
    return out.with_name(name + ending)


def named_values(option: str, entries: Sequence[str], value: str) -> dict[str, str]:
    """The values of an option that is given as NAME=VALUE, by name.

    Args:
      option: the option, which errors name.
      entries: what it was given, once for each name.
      value: what errors call a value, such as `DIR`.

    Raises:
      InputError: an entry of another form, or a name that is given twice.
    """
    values: dict[str, str] = {}
    for entry in entries:
        name, text = _split(entry)
        if not (name and text):
            raise InputError(f"{option} {entry!r} is not NAME={value}; put a name and an equals sign first.")
        if name in values:
            raise InputError(f"{option} {name!r} is given twice.")
        values[name] = text
    return values


def values_by_name[Value](
    option: str,
    entries: Sequence[str] | None,
    names: Sequence[str],
    convert: Callable[[str], Value],
    default: Value,
) -> dict[str, Value]:
    """The value of each name, from an option that is given as VALUE for all names and NAME=VALUE for one.

    Args:
      option: the option, which errors name.
      entries: what it was given.
      names: the adapters.
      convert: makes a value of a text, or raises a `ValueError`.
      default: the value of a name that no entry covers.

    Raises:
      InputError: a text that is not a value, an unknown name, or two values for one name.
    """
    values: dict[str | None, Value] = {}
    for entry in entries or ():
        name, text = _split(entry)
        if name is not None and name not in names:
            raise InputError(f"{option} {entry} names {name!r}, which no --adapter does.")
        if name in values:
            raise InputError(f"{option} is given twice for {'all adapters' if name is None else repr(name)}.")
        try:
            values[name] = convert(text)
        except ValueError as error:
            kind = "a whole number" if convert is int else "a number"
            raise InputError(f"{option} {entry} is not {kind}.") from error
    return {name: values.get(name, values.get(None, default)) for name in names}


def _split(entry: str) -> tuple[str | None, str]:
    """NAME=VALUE as both; None and all of it where there is no `=`."""
    name, equals, value = entry.partition("=")
    return (name, value) if equals else (None, entry)


def console(stderr: bool = False) -> Console:
    """A console, wide where it is no terminal, so that tables in logs and pipes keep their words whole."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160)


def report_progress(row: Mapping[str, Any]) -> None:
    """Writes a measured row to standard error as one line of names and values; the table follows when all are done."""
    shown = (f"{name} {f'{value:g}' if isinstance(value, float) else value}" for name, value in row.items())
    sys.stderr.write(f"{', '.join(shown)}\n")


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file that an option names, whole or not at all, and makes its folder.

    Raises:
      InputError: the system refuses to write.
    """
    make_folder(path)
    with writing_to(path):
        whole_file(path, content)


def make_folder(path: Path) -> None:
    """The folder of a file that an option names: before work whose results would have no place.

    Raises:
      InputError: the system refuses to make it.
    """
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)


def keep_compiled_programs() -> None:
    """Keeps programs for the next run, where nobody has named another folder. Before jax is imported."""
    with suppress(RuntimeError):  # a user without a home
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jax_moe_lora"
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(caches))
        os.environ.setdefault("JAX_MOE_LORA_PROGRAMS", str(caches / "programs"))


def command_line() -> str:
    """The command that was typed, without the folders of the machine that it was typed on."""
    words = [word.split("=") for word in sys.argv[1:]]
    return " ".join(["jax-moe-lora", *("=".join(Path(p).name if os.sep in p else p for p in word) for word in words)])


def join_processes(distributed: bool, mesh: str | None, start_seconds: int) -> bool:
    """Joins the other processes of a job, where there are any.

    Args:
      distributed: whether there are.
      mesh: the devices of all of them.
      start_seconds: how long they are waited for.

    Returns:
      Whether this process is the one that prints.

    Raises:
      InputError: several processes without a mesh.
      ProcessError: they do not find each other.
    """
    if not distributed:
        return True
    if mesh is None:
        raise InputError("--distributed splits a model over processes; say how with --mesh, such as expert=2.")
    from jax_moe_lora.mesh.processes import initialize, is_first

    initialize(start_seconds=start_seconds)
    return is_first()


def check_implementation(implementation: str | None) -> None:
    """Refuses a backend that does not run here, before the work."""
    from jax_moe_lora.devices import require_device
    from pallas_kernels.ops import UnsupportedImplementation, choose

    require_device()
    try:
        choose(implementation)
    except UnsupportedImplementation as error:
        raise InputError(str(error)) from error
