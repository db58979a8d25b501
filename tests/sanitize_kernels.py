"""Every Hopper kernel once, for the compute sanitizer, on an H100 or H200:

`JAX_PLATFORMS=cuda compute-sanitizer --tool memcheck python tests/sanitize_kernels.py`, and `--tool racecheck`.
Needs `PYTHONPATH=.:tests`. The layers are small: a sanitizer slows a kernel down some hundred times.
Command buffers are off: with them the process died under memcheck.
"""

import os

os.environ["XLA_FLAGS"] = "--xla_gpu_enable_command_buffer= " + os.environ.get("XLA_FLAGS", "")
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")  # each array its own allocation: overruns are seen

import jax.numpy as jnp
import numpy as np
from paged import PagedSpec, draw_layer

SPECS = {
    "stream form, plan kernel": PagedSpec(20, 192, 192, 6, 2, slots=3, ranks=(4, 40)),
    "tensor form, plan kernel": PagedSpec(600, 128, 192, 2, 2, slots=3, ranks=(4, 40)),
    "tensor form, plan through XLA": PagedSpec(2100, 128, 192, 2, 2, slots=3, ranks=(16,)),
}


def main() -> None:
    for name, spec in SPECS.items():
        layer = draw_layer(spec, np.random.default_rng(0))
        for adapters in (None, layer.adapters):
            hopper, xla = (
                layer.function(backend)(layer.slots, adapters).astype(jnp.float32) for backend in ("hopper", "xla")
            )
            error = float(jnp.linalg.norm(hopper - xla) / jnp.linalg.norm(xla))
            print(f"{name}, {'with' if adapters else 'no'} adapters: {error:.1e} from XLA", flush=True)
            assert error < 1e-2


if __name__ == "__main__":
    main()
