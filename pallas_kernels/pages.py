"""Pages of LoRA matrices and the table that finds them."""

from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.pytrees import pytree

RANK_PAGE = 16


@pytree
@dataclass(frozen=True)
class LoRAPages:
    """The adapters of one projection in one layer, for all slots.

    A page holds 16 ranks of one A or one B; page 0 is all zeros. A matrix of rank R is ceil(R / 16) pages in a row,
    its last page filled up with zeros. All experts of a shared matrix have the same first page.

    Attributes:
      a: `[N_A, 16, in]`, pages of A; b: `[N_B, 16, out]`, pages of B, transposed so that ranks are rows.
      table: int32 `[S, E, 4]`: first page of A, first page of B, number of pages, rank. All zero: no adapter.
      scale: float32 `[S, E]`, the factor on the update.
      max_rank: static: no adapter here has a larger rank.
    """

    a: Float[Array, "N_A 16 in"]
    b: Float[Array, "N_B 16 out"]
    table: Int[Array, "S E 4"]
    scale: Float[Array, "S E"]
    max_rank: int = field(metadata={"static": True})

    def without_slots(self) -> "LoRAPages":
        """The same pools, and no adapter in any slot."""
        return replace(self, table=jnp.zeros_like(self.table), scale=jnp.zeros_like(self.scale))

    def transposed(self) -> "LoRAPages":
        """The adapters of the transposed projection: `(B @ A).T = A.T @ B.T`, so A and B change places."""
        return replace(self, a=self.b, b=self.a, table=self.table[..., jnp.array([1, 0, 2, 3])])
