"""The arrays that the layer works on."""

from dataclasses import dataclass

from jaxtyping import Array, Float

from pallas_kernels.pytrees import pytree
from pallas_kernels.quantised.array import Quantised


@pytree
@dataclass(frozen=True)
class ExpertWeights:
    """All routed experts of one layer, each matrix `[out, in]` as checkpoints hold it, or quantised.

    Attributes:
      gate: `[E, F, D]`.
      up: `[E, F, D]`.
      down: `[E, D, F]`.
      gate_bias: `[E, F]`, for the families that have biases (gpt-oss).
      up_bias: `[E, F]`, likewise.
      down_bias: `[E, D]`, likewise.
    """

    gate: Float[Array, "E F D"] | Quantised
    up: Float[Array, "E F D"] | Quantised
    down: Float[Array, "E D F"] | Quantised
    gate_bias: Float[Array, "E F"] | None = None
    up_bias: Float[Array, "E F"] | None = None
    down_bias: Float[Array, "E D"] | None = None
