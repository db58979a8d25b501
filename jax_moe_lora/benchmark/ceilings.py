"""What the device can do at most, measured: the bandwidth of a large copy and the speed of a large matmul."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

REPEATS, QUEUED = 5, 20


@dataclass(frozen=True)
class Ceilings:
    """The limits of a device.

    Attributes:
      bytes_per_s: bytes per second of a copy, read and written bytes together.
      flop_per_s: floating-point operations per second of a bfloat16 matmul.
    """

    bytes_per_s: float
    flop_per_s: float


@functools.cache
def measure_ceilings() -> Ceilings:
    """The ceilings of the default device.

    They are measured once per process. On a GPU that takes half a second and 1 GB of its memory.

    Returns:
      The ceilings.
    """
    large = jax.default_backend() == "gpu"
    length, width = (2**27, 8192) if large else (2**22, 512)
    x = jax.random.normal(jax.random.key(0), (length,), jnp.bfloat16)
    copy = min(_seconds(jnp.copy, x), _seconds(jax.jit(lambda x: x + 1), x))
    a, b = jax.random.normal(jax.random.key(1), (2, width, width), jnp.bfloat16)  # zeros would run faster
    scale = width**-0.5  # keeps the values at the same magnitude
    matmul = _seconds(jax.jit(lambda a: ((a @ b) * scale).astype(a.dtype)), a)
    return Ceilings(2 * x.nbytes / copy, 2 * width**3 / matmul)


def _seconds(call: Callable[[jax.Array], jax.Array], x: jax.Array) -> float:
    """Seconds per call, of several calls queued before one wait; each takes the result of the one before."""
    jax.block_until_ready(call(x))
    times = []
    for _ in range(REPEATS):
        began, y = time.perf_counter(), x
        for _ in range(QUEUED):
            y = call(y)
        jax.block_until_ready(y)
        times.append((time.perf_counter() - began) / QUEUED)
    return min(times)
