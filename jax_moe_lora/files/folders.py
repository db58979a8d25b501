"""Folders and files that appear whole or not at all, whatever happens while they are written."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jax_moe_lora.errors import InputError
from jax_moe_lora.files.locks import LockedError, locked_folder

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def whole_folder(out: str | Path, marker: str, force: bool = False, source: Path | None = None) -> Iterator[Path]:
    """A folder to write files into, which becomes `out` once the block has ended and all of it is on disk.

    Until then it is beside `out`, as `.NAME.partial`, and `out` is left as it was. It is removed when the block raises;
    after a crash, the next process that writes `out` removes it.

    Args:
      out: the folder to make.
      marker: a file that every folder of this kind has.
      force: replace `out` if it exists, atomically where the system can exchange folders. Only a folder with the
        marker, or an empty one, is replaced, and never one that contains folders.
      source: the folder that is read meanwhile, which is never replaced.

    Yields:
      The folder to write into.

    Raises:
      InputError: `out` exists and may not be replaced, another process is writing it, or the system refuses to write.
    """
    out = Path(os.path.abspath(out))
    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise InputError(f"{out} is the folder that is read; give another one to write.")
    partial, replaced = (out.with_name(f".{out.name}.{what}") for what in ("partial", "replaced"))
    with writing_to(out):
        _put_back(out, replaced)
        _check(out, marker, force)
        partial.mkdir(exist_ok=True)
        with _claimed(partial, out):
            _empty(partial)
            try:
                yield partial
                _sync(partial)
                _move(partial, out, replaced)
            finally:
                shutil.rmtree(partial, ignore_errors=True)  # gone already, the old `out`, or what was left unfinished
        _sync_entry(out.parent)


def whole_file(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: other processes see the old content or all of the new.

    Args:
      path: the file, which is replaced if it exists.
      content: bytes, or text that is written as UTF-8.

    Raises:
      OSError: the system refuses to write; `writing_to` makes a sentence of it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def writing_to(path: Path, *kinds: type[Exception], advice: str = "") -> Iterator[None]:
    """Turns the system's refusals to write, such as a full disk, into one sentence.

    Args:
      path: the file or folder that the sentence names.
      kinds: exceptions that mean the same as an `OSError`.
      advice: what to do, the end of the sentence.

    Raises:
      InputError: in place of each of those exceptions.
    """
    try:
        yield
    except (OSError, *kinds) as error:
        problem = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be written: {problem}{advice and f'; {advice}'}.") from error


def check_parent(path: Path) -> None:
    """Raises an `InputError` if the folder that `path` would be written in does not exist."""
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}.")


def check_writable(path: Path | None) -> None:
    """Raises an `InputError` if a file cannot be written, before the work whose result it is to hold."""
    if path is None:
        return
    check_parent(path)
    if path.is_dir():
        raise InputError(f"{path} cannot be written: it is a folder; name a file.")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path} cannot be written: the folder {path.parent} takes no new files.")


def _check(out: Path, marker: str, force: bool) -> None:
    check_parent(out)
    if not os.path.lexists(out):
        return
    if not force:
        raise InputError(f"{out} exists; name a new folder, or replace it with force (--force).")
    if out.is_symlink() or not out.is_dir():
        raise InputError(f"{out} is no folder, and force replaces folders alone; name another.")
    entries = sorted(out.iterdir())
    if entries and not (out / marker).is_file():
        raise InputError(f"{out} holds no {marker}, and force replaces only a folder that does; name another.")
    if inner := next((path for path in entries if path.is_dir()), None):
        raise InputError(f"{out} holds the folder {inner.name}, which force never deletes; name another.")


@contextmanager
def _claimed(partial: Path, out: Path) -> Iterator[None]:
    """Holds a lock on the folder that dies with this process: what is not locked is a crash's leftover."""
    try:
        with locked_folder(partial):
            yield
    except LockedError as error:
        raise InputError(f"{out} is being written by another process; wait for it, or name another folder.") from error


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        entry.unlink()


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(partial: Path, out: Path, replaced: Path) -> None:
    """`partial` becomes `out`; an old `out` is left in `partial`'s place, or gone."""
    if not out.exists():
        partial.rename(out)
    elif not _exchange(partial, out):
        out.rename(replaced)
        try:
            partial.rename(out)
        finally:
            _put_back(out, replaced)


def _exchange(one: Path, other: Path) -> bool:
    """Whether two folders changed places in one step, which not every system and file system can."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    paths = os.fsencode(one), os.fsencode(other)
    return renameat2 is not None and renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0


def _put_back(out: Path, replaced: Path) -> None:
    """Ends a replacement in two steps, also one that a process died in: the old folder goes, or is `out` again."""
    if replaced.is_dir() and out.exists():
        shutil.rmtree(replaced)
    elif replaced.is_dir():
        replaced.rename(out)
