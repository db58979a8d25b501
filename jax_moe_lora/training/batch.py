"""What a training step reads."""

from dataclasses import dataclass, field

from jaxtyping import Array, Float, Int

from pallas_kernels.pytrees import pytree


@pytree
@dataclass(frozen=True)
class Batch:
    """Rows that hold one or several examples each, each example with its own adapter.

    Attributes:
      tokens: int32 `[B, T]`. positions: int32 `[B, T]`, a token's place in its example.
      segments: int32 `[B, T]`, 1 and up for the examples of a row, 0 for padding.
      slots: int32 `[B, T]`, the adapter of a token's example, `BASE_SLOT` for padding.
      targets: int32 `[B, T]`, the token that comes next. weights: float32 `[B, T]`, how much of its loss counts: 1
        where it is to be learnt, 0 in prompts and padding.
      packed: static. False says that each row holds one example, its padding behind it: attention then needs no mask.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    slots: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    packed: bool = field(default=True, metadata={"static": True})
