"""Skips of what this machine's GPU, or its absence, cannot run."""

import jax
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
