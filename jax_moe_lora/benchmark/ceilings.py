"""What the device can do at most, measured: the bytes of a large copy, the products of a large matmul."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

REPEATS, QUEUED = 5, 4


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second (read and written) and floating-point operations a second, of bfloat16 matmuls."""

    bytes_per_s: float
    flop_per_s: float


@functools.cache
def measure_ceilings() -> Ceilings:
    """Those of the default device, measured once a process: half a second on a GPU, in 10 GB of its memory."""
    large = jax.default_backend() == "gpu"
    length, width = (2**30, 8192) if large else (2**22, 512)
    copied = jax.random.normal(jax.random.key(0), (length,), jnp.bfloat16)
    copy = min(_seconds(jnp.copy, copied), _seconds(jax.jit(lambda x: x + 1), copied))
    a, b = jax.random.normal(jax.random.key(1), (2, width, width), jnp.bfloat16)  # zeros would run faster
    matmul = _seconds(jax.jit(lambda a, b: a @ b), a, b)
    return Ceilings(2 * copied.nbytes / copy, 2 * width**3 / matmul)


def _seconds(call: Callable[..., Any], *arguments: jax.Array) -> float:
    """Of one call, of several that are queued before one wait."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready([call(*arguments) for _ in range(QUEUED)])
        times.append((time.perf_counter() - began) / QUEUED)
    return min(times)
