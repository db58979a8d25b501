"""Memory that a call takes, counted where Python and numpy allocate it.

What else the process holds, has freed or is given by the system decides nothing.
"""

import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple


class Traced(NamedTuple):
    """What a call returned, and bytes: the most that it held at once, and what is held after it."""

    result: Any
    peak: int
    kept: int


def traced(call: Callable[[], Any]) -> Traced:
    tracemalloc.start()
    try:
        result = call()
        kept, peak = tracemalloc.get_traced_memory()
        return Traced(result, peak, kept)
    finally:
        tracemalloc.stop()


def peak_memory(call: Callable[[], Any]) -> int:
    return traced(call).peak
