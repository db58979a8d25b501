"""Locks between processes, which the system releases when the process that holds them dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockedError(Exception):
    """Another process or thread holds the lock."""


@contextmanager
def locked_folder(folder: Path, wait: bool = False) -> Iterator[None]:
    """Holds the exclusive lock of a folder until the block ends.

    Some network file systems have no locks. There, processes are not kept apart, unless `wait` is set.

    Args:
      folder: an existing folder.
      wait: wait for the lock instead of raising.

    Raises:
      LockedError: another block holds the lock, or replaced the folder meanwhile.
      OSError: the folder cannot be opened; with `wait`, its file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor, wait)
        # The last holder may have moved or removed the folder: then this is the lock of something else.
        if not (folder.exists() and os.path.samestat(os.stat(folder), os.fstat(descriptor))):
            raise LockedError(folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LockedError from error
    except OSError:
        if wait:
            raise
