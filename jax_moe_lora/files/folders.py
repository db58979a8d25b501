"""Folders that appear whole or not at all, whatever happens while they are written."""

import ctypes
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jax_moe_lora.errors import InputError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


@contextmanager
def whole_folder(out: str | Path, marker: str, force: bool = False) -> Iterator[Path]:
    """A folder to write files into, which becomes `out` once the block has ended and all of it is on disk.

    It stands beside `out`, as `.NAME.partial`. When the block raises, it goes; when the process dies, the next one that
    writes `out` removes it. Until the last step `out` is as it was.

    Args:
      marker: a file that folders of this kind have. force: replace `out`, by an exchange in one step where the system
        has one; only a folder with this file, or an empty one, and never one that holds folders.

    Raises:
      InputError: `out` exists, may not be replaced, is written by another process, or the system refuses to write.
    """
    out = Path(os.path.abspath(out))
    partial, replaced = (out.with_name(f".{out.name}.{what}") for what in ("partial", "replaced"))
    try:
        _put_back(out, replaced)
        _check(out, marker, force)
        lock = _claim(partial, out)
        try:
            yield partial
            _sync(partial)
            _move(partial, out, replaced)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # gone already, the old `out`, or what was left unfinished
            os.close(lock)
        _sync_entry(out.parent)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}.") from error


def _check(out: Path, marker: str, force: bool) -> None:
    if not out.parent.is_dir():
        raise InputError(f"{out} cannot be written: there is no folder {out.parent}.")
    if not os.path.lexists(out):
        return
    if not force:
        raise InputError(f"{out} exists; name a new folder, or replace it with force (--force).")
    if out.is_symlink() or not out.is_dir():
        raise InputError(f"{out} is no folder, and force replaces folders alone; name another.")
    held = sorted(out.iterdir())
    if held and not (out / marker).is_file():
        raise InputError(f"{out} holds no {marker}, and force replaces only a folder that does; name another.")
    if inner := next((path for path in held if path.is_dir()), None):
        raise InputError(f"{out} holds the folder {inner.name}, which force never deletes; name another.")


def _claim(partial: Path, out: Path) -> int:
    """The folder, empty, and a lock on it that dies with this process: what is not locked is a crash's leftover."""
    partial.mkdir(exist_ok=True)
    lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not (partial.exists() and os.path.samestat(os.stat(partial), os.fstat(lock)))
        except BlockingIOError:
            taken = True
        except OSError:  # some network file systems have no locks; there two processes are not told apart
            taken = False
        if taken:
            raise InputError(f"{out} is being written by another process; wait for it, or name another folder.")
        for entry in partial.iterdir():
            entry.unlink()
        return lock
    except BaseException:
        os.close(lock)
        raise


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
