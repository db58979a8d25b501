"""Every Hopper kernel once, for the compute sanitizer, on an H100 or H200:

`PYTHONPATH=.:tests JAX_PLATFORMS=cuda,cpu compute-sanitizer --tool TOOL --kernel-name kns=mosaic python
tests/support/sanitize_kernels.py`, with `memcheck` and with `racecheck`. The layers are small: a sanitizer slows a
kernel down some hundred times. Words after the script's name choose among them. Command buffers are off, and nothing
is multiplied through XLA: under the sanitizer the process died in command buffers, and in the autotuning of matmuls.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0"
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")  # each array its own allocation: overruns are seen

import sys
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from support.gradients import TOLERANCE, arguments, assert_gradients, loss, plain
from support.paged import PagedSpec, draw_layer, wide

SPECS = {
    "few tokens": PagedSpec(5, 192, 192, 6, 2, slots=3, ranks=(4, 40)),
    "short tiles, plan kernel": PagedSpec(20, 192, 192, 6, 2, slots=3, ranks=(4, 40)),
    "long tiles, plan kernel": PagedSpec(600, 128, 192, 2, 2, slots=3, ranks=(4, 40)),
    "long tiles, counting plan": PagedSpec(2100, 128, 192, 2, 2, slots=3, ranks=(16,)),
}

GRADIENTS = {
    "gradients, short tiles": PagedSpec(20, 192, 192, 6, 2, slots=3, ranks=(4, 40)),
    "gradients, long tiles": PagedSpec(600, 128, 192, 2, 2, slots=3, ranks=(4, 72)),
}


def main() -> None:
    chosen = lambda name: all(word in name for word in sys.argv[1:])  # noqa: E731
    for name, spec in GRADIENTS.items():
        if chosen(name):
            gradients(name, spec)
    for name, spec in SPECS.items():
        if not chosen(name):
            continue
        layer = draw_layer(spec, np.random.default_rng(0))
        tokens = np.arange(0, spec.tokens, 7)
        for adapters, matrices in ((None, {}), (layer.adapters, layer.matrices)):
            began = time.perf_counter()
            actual = wide(layer.function("hopper")(layer.slots, adapters))[tokens]
            expected = replace(layer, matrices=matrices).expected(tokens)
            error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
            seconds = time.perf_counter() - began
            print(f"{name}, {'with' if adapters else 'no'} adapters: error {error:.1e}, {seconds:.0f} s", flush=True)
            assert error < 1e-2


def gradients(name: str, spec: PagedSpec) -> None:
    """Of a whole layer: the kernels of both passes. What they should be is computed on the CPU."""
    layer = draw_layer(spec, np.random.default_rng(0))
    x, gates, experts, pools = arguments(layer)
    values = x, gates, experts, jax.tree.map(lambda pool: pool.astype(jnp.float32), pools)
    wide = jax.device_put(jax.tree.map(lambda v: v.astype(jnp.float32), values), jax.devices("cpu")[0])
    expected = jax.jit(jax.grad(partial(plain, layer), (0, 1, 3)))(*wide)
    for remat in (False, True):
        began = time.perf_counter()
        found = jax.device_get(jax.jit(jax.grad(partial(loss, layer, "hopper", remat), (0, 1, 3)))(*values))
        print(f"{name}, remat={remat}: {time.perf_counter() - began:.0f} s", flush=True)
        assert_gradients(found, jax.device_get(expected), TOLERANCE[spec.dtype])


if __name__ == "__main__":
    main()
