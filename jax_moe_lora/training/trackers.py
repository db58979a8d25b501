"""The figures of a run in TensorBoard or Weights & Biases, beside its `metrics.jsonl`."""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from jax_moe_lora.arguments import one_of
from jax_moe_lora.errors import InputError

Tracker = Literal["tensorboard", "wandb"]
Line = Mapping[str, Any]


class Sink(Protocol):
    """What takes the lines of `metrics.jsonl`."""

    def write(self, line: Line) -> None:
        """Takes a line."""

    def sync(self) -> None:
        """Hands on what was taken."""


def check_trackers(log_to: Sequence[str]) -> tuple[Tracker, ...]:
    """The trackers of these names, whose libraries are installed.

    Args:
      log_to: names, each `tensorboard` or `wandb`.

    Raises:
      InputError: an unknown name, or a library that is missing.
    """
    log_to = [log_to] if isinstance(log_to, str) else log_to
    for name in log_to:
        one_of("log_to", name, get_args(Tracker))
        try:
            import_module(name)
        except ImportError as error:
            raise InputError(f"log_to is {name!r}, which is not installed; install jax-moe-lora[{name}].") from error
    return tuple(name for name in get_args(Tracker) if name in log_to)


@contextmanager
def open_trackers(
    trackers: Sequence[Tracker], out: Path, lines: Sequence[Line], settings: Mapping[str, Any]
) -> Iterator[list[Sink]]:
    """The trackers of a run, until the block ends.

    Args:
      trackers: which.
      out: the run's folder.
      lines: the lines of `metrics.jsonl` that the run goes on from.
      settings: what the run was started with.
    """
    with ExitStack() as stack:
        sinks: list[Sink] = []
        for name in trackers:
            sink = TensorBoard(out, lines) if name == "tensorboard" else WeightsAndBiases(out, lines, settings)
            stack.callback(sink.close)
            sinks.append(sink)
        yield sinks


class TensorBoard:
    """Event files in `out/tensorboard`, made anew when a run is resumed, so that they agree with `metrics.jsonl`."""

    def __init__(self, out: Path, lines: Sequence[Line]):
        from tensorboard.summary import Writer

        shutil.rmtree(out / "tensorboard", ignore_errors=True)
        self._writer = Writer(str(out / "tensorboard"))
        for line in lines:
            self.write(line)

    def write(self, line: Line) -> None:
        """Takes a line."""
        for name, value in scalars(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def sync(self) -> None:
        """Puts what was taken on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run, with its files in `out/wandb`; a run that is resumed goes on in the same one."""

    def __init__(self, out: Path, lines: Sequence[Line], settings: Mapping[str, Any]):
        import wandb

        id_file = out / "wandb" / "run_id"
        is_new = not id_file.is_file()
        if is_new:
            id_file.parent.mkdir(exist_ok=True)
            id_file.write_text(uuid.uuid4().hex)
        project = None if "WANDB_PROJECT" in os.environ else "jax-moe-lora"
        try:
            self._run = wandb.init(
                project=project, dir=out, id=id_file.read_text(), name=out.name, resume="allow", config=dict(settings)
            )
        except wandb.Error as error:
            raise InputError(
                f"Weights & Biases cannot be used: {error}; log in (`wandb login`), or set WANDB_MODE=offline."
            ) from error
        for line in lines if is_new else ():
            self.write(line)

    def write(self, line: Line) -> None:
        """Takes a line."""
        self._run.log(scalars(line), step=line["step"])

    def sync(self) -> None:
        """W&B's own process sends what was taken."""

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


def scalars(line: Line) -> dict[str, float]:
    """A line's figures, such as `loss/sql` and `evaluation_loss/sql`: one chart a figure, with all adapters."""
    adapters = line.get("adapters", {})
    evaluations = line.get("evaluation", {})
    return {f"{figure}/{name}": value for name, figures in adapters.items() for figure, value in figures.items()} | {
        f"evaluation_{figure}/{name}": evaluations[name][figure]
        for name in evaluations
        for figure in ("loss", "exact_match")
    }
