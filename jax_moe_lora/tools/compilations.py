"""Counts jax's own compile events, so that "nothing recompiles" is a number."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass
class Count:
    """Programs that jax compiled, in the whole process, while the block ran."""

    compilations: int = 0
    seconds: float = 0.0


@contextmanager
def count_compilations() -> Iterator[Count]:
    """`with count_compilations() as count: ...`, then `count.compilations`."""
    count = Count()

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _EVENT:
            count.compilations += 1
            count.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
