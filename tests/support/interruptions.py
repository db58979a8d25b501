"""Ends a process, or fails one call, at the n-th thing that is done to files."""

import errno
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile", "ctypes.dlsym")
_watch = threading.local()


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in WATCHED or getattr(_watch, "action", None) is None:
        return
    if event == "open" and not str(arguments[0]).startswith(_watch.root):
        return
    _watch.left -= 1
    if _watch.left == 0:
        action, _watch.action = _watch.action, None
        action()


@cache
def _install() -> None:
    sys.addaudithook(_on_event)  # for good; it does nothing where nobody is interrupted


def interrupting(n: int, root: Path, action: Callable[[], None]) -> None:
    """Does `action` at the n-th thing that this thread does to files from now on; opening counts below `root`."""
    _install()
    _watch.left, _watch.root, _watch.action = n, str(root), action


def interrupted() -> bool:
    """Whether it came to that; if not, it never will."""
    action, _watch.action = _watch.action, None
    return action is None


def fail() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed_at(n: int, root: Path, work: Callable[[], None]) -> int:
    """Exit status of a process that is killed at its n-th change to files; 0 where it ends before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax's threads are not in the child, which does not use them
        child = os.fork()
    if child == 0:
        interrupting(n, root, lambda: os.kill(os.getpid(), signal.SIGKILL))
        try:
            work()
        finally:
            os._exit(int(sys.exc_info()[0] is not None))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status
