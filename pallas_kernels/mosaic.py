"""Mosaic GPU kernels as every op starts them."""

from collections.abc import Callable
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.varying import varying_as


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel`, whose results vary over the mesh axes of its operands under `jax.shard_map`.

    Without the mark jax would take the results for replicated, and a sum over the mesh after them would have a gradient
    that is too large by the number of devices.

    Args:
      body: the kernel.
      options: as `plgpu.kernel` takes them.
    """
    call = plgpu.kernel(body, **options)
    return lambda *operands: varying_as(call(*operands), operands)
