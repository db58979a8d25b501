"""The arrays that a training step reads."""

from dataclasses import dataclass, field

from jaxtyping import Array, Float, Int

from pallas_kernels.pytrees import pytree


@pytree
@dataclass(frozen=True)
class Batch:
    """Rows of one or several examples each, where every example has its own adapter.

    Attributes:
      tokens: int32 `[B, T]`.
      positions: int32 `[B, T]`, the index of each token in its example.
      segments: int32 `[B, T]`, 1 and up for the examples of a row, 0 for padding.
      slots: int32 `[B, T]`, the adapter of each token, `BASE_SLOT` for padding.
      targets: int32 `[B, T]`, the token that follows.
      weights: float32 `[B, T]`, the weight of each target in the loss: 0 in prompts and padding.
      routing: int32 `[B, T, L, K]` for L routed layers, the experts that each token goes to, such as those of the
        generation that is trained on (`Generation.routing`); the routers choose where they are negative. None leaves
        every choice to the routers.
      packed: static. False means that each row is one example followed by padding, so that attention needs no mask.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    slots: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    routing: Int[Array, "B T L K"] | None = None
    packed: bool = field(default=True, metadata={"static": True})
