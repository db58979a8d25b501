"""What tests on a GPU share: skips of what this machine's GPU, or its absence, cannot run, and poisoned memory."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.ops import UnsupportedImplementation, choose


def require(*implementations: str) -> None:
    """Skips the test where there is no GPU, or one that cannot run a backend of these names."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs JAX_PLATFORMS=cuda and a GPU")
    for implementation in implementations:
        try:
            choose(implementation)
        except UnsupportedImplementation as error:
            pytest.skip(str(error))


def skip_without_gpu(item: pytest.Item) -> None:
    """Before its fixtures, skips a test marked `gpu`, or `gpu(backend)`, that cannot run here.

    A backend may also be the test's parameter `implementation`.
    """
    if (gpu := item.get_closest_marker("gpu")) is None:
        return
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    require(*gpu.args, *(value for name, value in parameters.items() if name == "implementation"))


def poison() -> None:
    """Fills free device memory with NaN, so that what a kernel does not write shows."""
    blocks = [jnp.full(2**26, jnp.nan, jnp.float32) for _ in range(4)] + [
        jnp.full(2**k, jnp.nan, jnp.float32) for k in range(6, 26)
    ]
    jax.block_until_ready(blocks)
