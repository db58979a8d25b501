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
) -> Choice:
    """Picks the implementation of the grouped ops; `None` takes the best that runs this call.

    Args:
      implementation: a backend by name, or None.
      dtype: of the rows. operands: dtypes of weights and pages. widths: of the projection's rows, in and out.
      result: dtype of the result, `dtype` where None.

    Raises:
      UnsupportedImplementation: for a name that is unknown, or known and not able to run the call.
    """
    why_not = {
        "hopper": _why_not_hopper(jnp.dtype(dtype), operands, widths, jnp.dtype(dtype if result is None else result)),
        "portable": "its kernels are not written yet",
        "reference": "it is written for reading, not for speed: ask for it by name",
    }
    if implementation is None:
        picked: Implementation = "xla" if why_not["hopper"] else "hopper"
        why_not["xla"] = "hopper is faster"
        return Choice(picked, {name: why for name, why in why_not.items() if name != picked})
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


def _why_not_hopper(
    dtype: jnp.dtype, operands: Sequence[jax.typing.DTypeLike], widths: Sequence[int], result: jnp.dtype
) -> str:
    """Empty where the Hopper kernels can run the call."""
    device = default_device()
    capability = getattr(device, "compute_capability", None)
    if capability != "9.0":
        found = device.platform if capability is None else f"compute capability {capability}"
        return f"it needs a GPU of compute capability 9.0 (H100, H200), this is {found}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"its tensor cores multiply bfloat16 and float16, these are {dtype} (float32 would become TF32)"
    others = {str(jnp.dtype(operand)) for operand in operands} - {str(dtype)}
    if others:
        return f"rows, weights and pages must have one dtype, these are {dtype} and {', '.join(sorted(others))}"
    if result != dtype:
        return f"it returns {dtype}, the call wants {result}"
    if any(width % WIDTH_MULTIPLE or width > MAX_WIDTH for width in widths):
        return f"widths must be multiples of {WIDTH_MULTIPLE} up to {MAX_WIDTH}, these are {list(widths)}"
    return ""
