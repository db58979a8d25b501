"""The device that jax computes on, asked for before the work that needs it."""

import jax

from jax_moe_lora.errors import DeviceError
from pallas_kernels.backend import default_device


def require_device() -> jax.Device:
    """The device that calls run on unless they are placed elsewhere.

    Raises:
      DeviceError: jax has none, such as `JAX_PLATFORMS=cuda` without a GPU.
    """
    try:
        return default_device()
    # Mostly a RuntimeError; an AssertionError without a word for `cuda` where jax's CUDA plugin is not installed.
    except Exception as error:
        reason = str(error).partition(" (set JAX_PLATFORMS=")[0].rstrip(".") or "that platform is not installed"
        raise DeviceError(
            f"jax finds no device for JAX_PLATFORMS={jax.config.jax_platforms or ''!r}: {reason}; unset it, or name a "
            "platform that this machine has, such as cpu."
        ) from error


def device_named(platform: str) -> jax.Device:
    """The first device of a platform.

    Args:
      platform: as jax calls it, such as `cpu` or `gpu`.

    Raises:
      DeviceError: jax has no device of this platform.
    """
    try:
        return jax.devices(platform)[0]
    except RuntimeError as error:
        raise DeviceError(f"jax has no device {platform!r} here; expected one of {', '.join(_platforms())}.") from error


def _platforms() -> list[str]:
    """The platforms that jax has devices of; a CPU is always one unless JAX_PLATFORMS leaves it out."""
    return sorted({require_device().platform, *(device.platform for device in jax.local_devices())})
