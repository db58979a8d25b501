"""`jax-moe-lora` and its commands. Exit code 2 and one sentence on bad input."""

import sys
from importlib import metadata
from typing import Annotated

import typer

from jax_moe_lora.cli.bench import bench
from jax_moe_lora.cli.bench_load import bench_load
from jax_moe_lora.cli.bench_model import bench_model
from jax_moe_lora.cli.bench_train import bench_train
from jax_moe_lora.cli.convert import convert, merge
from jax_moe_lora.cli.demo import demo
from jax_moe_lora.cli.families import families
from jax_moe_lora.cli.generate import generate
from jax_moe_lora.cli.inspect import inspect
from jax_moe_lora.cli.options import keep_compiled_programs
from jax_moe_lora.cli.parity import parity
from jax_moe_lora.cli.quantise import quantise
from jax_moe_lora.cli.scaling import scaling
from jax_moe_lora.cli.train import train
from jax_moe_lora.cli.tune import tune
from jax_moe_lora.cli.validate import validate
from jax_moe_lora.errors import JaxMoELoRAError, TrainingDataError

# click's class, which newer versions of typer hold a copy of and do not export.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


def print_version(asked: bool) -> None:
    """Answers `--version`, whatever follows it."""
    if asked:
        sys.stdout.write(f"jax-moe-lora {metadata.version('jax-moe-lora')}\n")
        raise typer.Exit


@app.callback(help=__doc__)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before the name of a command."""
    if context.invoked_subcommand is not None and not context.invoked_subcommand.startswith(("bench", "tune")):
        keep_compiled_programs()


for command in (
    convert,
    merge,
    quantise,
    train,
    bench,
    bench_load,
    bench_model,
    bench_train,
    tune,
    demo,
    families,
    generate,
    inspect,
    parity,
    scaling,
    validate,
):
    app.command()(command)


def main() -> None:
    """Entry point: the library's own errors and bad options become one sentence and exit code 2."""
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.Abort:
        code = 1
    except UsageError as error:
        code = refuse(error.format_message())  # type: ignore[attr-defined]
    except TrainingDataError as error:
        code = refuse(*str(error).splitlines())
    except JaxMoELoRAError as error:
        code = refuse(str(error))
    joined = sys.modules.get("jax_moe_lora.mesh.last_words")
    if code and joined is not None:
        joined.leave(code)
    sys.exit(code)


def refuse(message: str, *more_lines: str) -> int:
    """Writes one sentence to standard error, or a list of them; the exit code."""
    sys.stderr.write("\n".join([f"jax-moe-lora: {' '.join(message.split())}", *more_lines, ""]))
    return 2


if __name__ == "__main__":
    main()
