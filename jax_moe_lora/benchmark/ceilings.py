"""What the device can do at most, measured: the bytes of a large copy, the products of a large matmul."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

REPEATS, QUEUED = 5, 20


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second (read and written) and floating-point operations a second, of bfloat16 matmuls."""

    bytes_per_s: float
    flop_per_s: float


@functools.cache
def measure_ceilings() -> Ceilings:
    """Those of the default device, measured once a process: half a second on a GPU, in 1 GB of its memory."""
    large = jax.default_backend() == "gpu"
    length, width = (2**27, 8192) if large else (2**22, 512)
    x = jax.random.normal(jax.random.key(0), (length,), jnp.bfloat16)
    copy = min(_seconds(jnp.copy, x), _seconds(jax.jit(lambda x: x + 1), x))
    a, b = jax.random.normal(jax.random.key(1), (2, width, width), jnp.bfloat16)  # zeros would run faster
    scale = width**-0.5  # so that the numbers stay as large as they are
    matmul = _seconds(jax.jit(lambda a: ((a @ b) * scale).astype(a.dtype)), a)
    return Ceilings(2 * x.nbytes / copy, 2 * width**3 / matmul)


def _seconds(call: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Of one call, of several that are queued before one wait, each with the last one's result."""
    jax.block_until_ready(call(x))
    times = []
    for _ in range(REPEATS):
        began, y = time.perf_counter(), x
        for _ in range(QUEUED):
            y = call(y)
        jax.block_until_ready(y)
        times.append((time.perf_counter() - began) / QUEUED)
    return min(times)
