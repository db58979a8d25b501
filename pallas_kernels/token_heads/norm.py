"""The norm over each head of queries and keys."""

from dataclasses import dataclass, field

from jaxtyping import Array, Float

from pallas_kernels.pytrees import pytree


@pytree
@dataclass(frozen=True)
class HeadNorm:
    """The root-mean-square norm over each head of q and of k.

    Attributes:
      q: weight `[hd]`.
      k: likewise.
      eps: added to the mean square.
      offset: the factor is `1 + weight`, in float32.
      wide: the factor is the weight, in float32; else it is multiplied in the cache's dtype.
    """

    q: Float[Array, "hd"]
    k: Float[Array, "hd"]
    eps: float = field(metadata={"static": True})
    offset: bool = field(default=False, metadata={"static": True})
    wide: bool = field(default=False, metadata={"static": True})
