"""A sentence about a process that ends without a word.

jax aborts a process whose job lost another one, from a thread that Python has no part in. So a small process beside it
waits for its end, and says what it was told last.
"""

import atexit
import os
import subprocess
import sys
from typing import NoReturn

import jax

from jax_moe_lora.errors import JaxMoELoRAError

_LISTEN = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
last = ""
for line in sys.stdin:
    last = line.strip()
if last:
    sys.stderr.write(f"jax-moe-lora: {last}\\n")
"""


_joined: "list[LastWords]" = []


def join() -> "LastWords":
    """What this process says from now on where it ends without a word."""
    if not _joined:
        _joined.append(LastWords())
    return _joined[0]


def leave(code: int) -> None:
    """Ends a process that has joined others at once, so that they do not wait for it; else does nothing.

    Args:
      code: its exit code, whose reason has been said.
    """
    if _joined:
        _joined[0].leave(code)


class LastWords:
    """What standard error gets where this process ends before `set("")`, however it ends."""

    def __init__(self) -> None:
        command = [sys.executable, "-S", "-E", "-c", _LISTEN]
        self._listener = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        atexit.register(self._end)

    def set(self, sentence: str) -> None:
        """Replaces what will be said.

        Args:
          sentence: on one line; empty for nothing.
        """
        assert self._listener.stdin is not None
        self._listener.stdin.write(f"{' '.join(sentence.split())}\n")
        self._listener.stdin.flush()

    def _end(self) -> None:
        """The end. A regular one waits for the other processes: until they have come to theirs, this one may fail."""
        failed = getattr(sys, "last_exc", None)
        if failed is not None:
            self.leave(1, silent=isinstance(failed, JaxMoELoRAError))
        try:
            jax.distributed.shutdown()
        except RuntimeError:  # another one is gone
            self.leave(1, silent=False)
        self.set("")
        assert self._listener.stdin is not None
        self._listener.stdin.close()
        self._listener.wait()

    def leave(self, code: int, silent: bool = True) -> NoReturn:
        """Ends the process at once, which the others notice, and does not wait for them.

        Args:
          code: its exit code.
          silent: the reason has been said already.
        """
        if silent:
            self.set("")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
