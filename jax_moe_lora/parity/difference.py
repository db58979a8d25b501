"""By how much a result differs from a reference."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float

from jax_moe_lora.arguments import host_array
from jax_moe_lora.errors import InputError


@dataclass(frozen=True)
class Difference:
    """A result beside its reference.

    Attributes:
      max_abs: largest absolute difference.
      relative: Frobenius norm of the difference over that of the reference.
      cosine: of the angle between the two, 1 where they point the same way.
      equal: they are equal, number for number.
    """

    max_abs: float
    relative: float
    cosine: float
    equal: bool


def difference(
    result: Float[np.ndarray | jax.Array, "*N"], reference: Float[np.ndarray | jax.Array, "*N"]
) -> Difference:
    """Compares two arrays or torch tensors of one shape, in float64. A NaN in either makes no figure look small.

    Args:
      result: what was computed.
      reference: what was expected.

    Raises:
      InputError: shapes that disagree.
    """
    if tuple(result.shape) != tuple(reference.shape):
        raise InputError(
            f"The result is {list(result.shape)}, the reference {list(reference.shape)}; give two of one shape."
        )
    actual, expected = (host_array(array).astype(np.float64) for array in (result, reference))
    error, size, length = (float(np.linalg.norm(array)) for array in (actual - expected, expected, actual))
    return Difference(
        max_abs=float(np.abs(actual - expected).max(initial=0.0)),
        relative=0.0 if error == 0 else error / size if size else float("inf"),
        cosine=1.0 if error == 0 else float((actual * expected).sum() / (size * length)) if size * length else 0.0,
        equal=bool((actual == expected).all()),
    )
