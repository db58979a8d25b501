"""Which implementation runs a call, and why not the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import jax
import jax.numpy as jnp

Implementation = Literal["hopper", "portable", "xla", "reference"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("hopper", "portable", "xla", "reference")
WIDTH_MULTIPLE = 64  # one ring stage of the kernels
MAX_WIDTH = 256 * 64  # a row in one TMA box
MAX_SLOTS = 256  # `hopper.py` unrolls over them


class UnsupportedImplementation(ValueError):
    """The requested implementation does not run this call; the message says why and what does."""


@dataclass(frozen=True)
class Choice:
    """The implementation that was picked, and for each other one why it was not."""

    picked: Implementation
    why_not: dict[str, str]


def choose(
    implementation: str | None = None,
    *,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    operands: Sequence[jax.typing.DTypeLike] = (),
    widths: Sequence[int] = (),
    result: jax.typing.DTypeLike | None = None,
    slots: int = 0,
) -> Choice:
    """Picks the implementation of the grouped ops; `None` takes the best that runs this call.

    Args:
      implementation: a backend by name, or None.
      dtype: of the rows. operands: dtypes of weights and pages. widths: of the projection's rows, in and out.
      result: dtype of the result, `dtype` where None. slots: adapter slots.

    Raises:
      UnsupportedImplementation: for a name that is unknown, or known and not able to run the call.
    """
    call = (jnp.dtype(dtype), operands, widths, jnp.dtype(dtype if result is None else result))
    why_not = {
        "hopper": _why_not_hopper(*call) or _why_not_slots(slots),
        "portable": _why_not_portable(*call),
        "reference": "it is written for reading, not for speed: ask for it by name",
    }
    if implementation is None:
        kernels: tuple[Implementation, ...] = ("hopper", "portable")
        able = [name for name in kernels if not why_not[name]]
        picked: Implementation = able[0] if able else "xla"
        why_not["xla"] = f"{picked} has kernels for this GPU"
        return Choice(
            picked, {name: why or f"{picked} is preferred" for name, why in why_not.items() if name != picked}
        )
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedImplementation(
            f"implementation={implementation!r} is unknown; use one of {IMPLEMENTATIONS} or None."
        )
    if implementation in ("hopper", "portable") and why_not[implementation]:
        raise UnsupportedImplementation(
            f"implementation={implementation!r} cannot run this: {why_not[implementation]}; use 'xla' or None."
        )
    reasons = {str(name): why_not.get(name) or "another was asked for" for name in IMPLEMENTATIONS}
    del reasons[implementation]
    return Choice(cast(Implementation, implementation), reasons)


def default_device() -> jax.Device:
    """The device that a call runs on unless it is placed elsewhere."""
    default = jax.config.jax_default_device  # a device, a platform's name, or None
    return jax.devices(default)[0] if default is None or isinstance(default, str) else default


def device_capability() -> tuple[tuple[int, ...] | None, str]:
    """Compute capability of the default device, None where it is no NVIDIA GPU; and what to call it."""
    device = default_device()
    capability = getattr(device, "compute_capability", None)
    if capability is None or not capability.replace(".", "").isdecimal():  # ROCm says gfx942, say
        return None, device.platform
    return tuple(map(int, capability.split("."))), f"compute capability {capability}"


def _why_not_hopper(
    dtype: jnp.dtype, operands: Sequence[jax.typing.DTypeLike], widths: Sequence[int], result: jnp.dtype
) -> str:
    """Empty where the Hopper kernels can run the call."""
    capability, found = device_capability()
    if capability != (9, 0):
        return f"it needs a GPU of compute capability 9.0 (H100, H200), this is {found}"
    if any(width % WIDTH_MULTIPLE or width > MAX_WIDTH for width in widths):
        return f"widths must be multiples of {WIDTH_MULTIPLE} up to {MAX_WIDTH}, these are {list(widths)}"
    return _why_not_dtypes(dtype, operands, result)


def _why_not_slots(slots: int) -> str:
    """Empty where the Hopper kernels serve so many adapter slots."""
    return f"it serves up to {MAX_SLOTS} adapter slots, these are {slots}" if slots > MAX_SLOTS else ""


def _why_not_portable(
    dtype: jnp.dtype, operands: Sequence[jax.typing.DTypeLike], widths: Sequence[int], result: jnp.dtype
) -> str:
    """Empty where the portable kernels can run the call."""
    capability, found = device_capability()
    if capability is None or capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or later, this is {found}"
    if any(width % WIDTH_MULTIPLE for width in widths):
        return f"widths must be multiples of {WIDTH_MULTIPLE}, these are {list(widths)}"
    return _why_not_dtypes(dtype, operands, result)


def _why_not_dtypes(dtype: jnp.dtype, operands: Sequence[jax.typing.DTypeLike], result: jnp.dtype) -> str:
    """Empty where the tensor cores can multiply these."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"its tensor cores multiply bfloat16 and float16, these are {dtype} (float32 would become TF32)"
    others = {str(jnp.dtype(operand)) for operand in operands} - {str(dtype)}
    if others:
        return f"rows, weights and pages must have one dtype, these are {dtype} and {', '.join(sorted(others))}"
    return "" if result == dtype else f"it returns {dtype}, the call wants {result}"
