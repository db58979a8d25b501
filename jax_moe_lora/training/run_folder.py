"""The folder of a run: one process at a time writes to it, and its metrics agree with its checkpoint."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax_moe_lora.errors import InputError
from jax_moe_lora.files.folders import check_parent, whole_file, writing_to
from jax_moe_lora.files.locks import LockedError, locked_folder

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"
RESERVED = (CHECKPOINTS, METRICS, "tensorboard", "wandb")  # what a run puts beside its adapters


def check_out(out: Path, resume: bool) -> None:
    """Refuses a folder in which a run cannot begin, or from which it cannot be resumed.

    Args:
      out: the run's folder.
      resume: whether a run may be there already.

    Raises:
      InputError: what stands in the way.
    """
    check_parent(out)
    if not os.path.lexists(out):
        return
    if not resume:
        raise InputError(f"{out} exists; go on with its run (--resume, resume=True), or name a new folder.")
    if not out.is_dir():
        raise InputError(f"{out} is not a directory; name one.")
    if not (out / CHECKPOINTS).is_dir() and any(out.iterdir()):
        raise InputError(f"{out} has files but no run; name another folder.")


@contextmanager
def run_folder(out: Path, resume: bool) -> Iterator[Path]:
    """Makes the folder if it does not exist, and locks it against other processes.

    Args:
      out: the run's folder.
      resume: whether a run may be there already.

    Raises:
      InputError: as `check_out`; or another process trains there, or the system refuses to write.
    """
    check_out(out, resume)
    with writing_to(out):
        out.mkdir(exist_ok=resume)
        (out / CHECKPOINTS).mkdir(exist_ok=True)
    try:
        with locked_folder(out):
            yield out
    except LockedError as error:
        raise InputError(f"{out} is being written by another run; wait for it, or name another folder.") from error


class MetricsFile:
    """JSON lines, one per step, beginning with those of the steps that the run goes on from; a context manager.

    Attributes:
      kept: the lines of the steps that the run goes on from.
    """

    def __init__(self, path: Path, step: int):
        kept = [line for line in _lines(path) if _step_of(line) <= step]
        whole_file(path, b"".join(kept))
        self.kept: list[dict[str, Any]] = [json.loads(line) for line in kept]
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line."""
        self._file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Returns once the lines are on disk: a checkpoint is written after the lines of the steps before it."""
        self._file.flush()
        os.fsync(self._file.fileno())


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def _step_of(line: bytes) -> float:
    """The step of a line; infinite for an incomplete line, which a killed process may leave."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
