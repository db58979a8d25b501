"""The adapters of a dense projection in their packed form: the pages of all slots side by side, in two matmuls."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import backend_named
from pallas_kernels.ops import RANK_PAGE, Implementation, LoRAPages, choose
from pallas_kernels.xla.dot import matmul, matmul_t

MAX_PACKED_RANKS = 2048  # of all slots: as wide as a projection itself; beyond, most of the packed product is zeros


def packs(x: Float[Array, "T in"], pages: LoRAPages, implementation: Implementation | None) -> bool:
    """Whether the packed form serves this call.

    Args:
      x: `[T, in]`, the rows.
      pages: the projection's adapters.
      implementation: a backend by name, or None for the best.

    Raises:
      UnsupportedImplementation: no backend has this name.
    """
    if implementation is not None and not backend_named(implementation).packs_dense:
        return False
    ranks = min(pages.table.shape[0], x.shape[0]) * -(-pages.max_rank // RANK_PAGE) * RANK_PAGE
    return ranks <= MAX_PACKED_RANKS and backend_named(choose(dtype=x.dtype).picked).packs_dense


def packed_update(x: Float[Array, "T in"], pages: LoRAPages, slots: Int[Array, "T"]) -> Float[Array, "T out"]:
    """`scale[s] * (x[t] @ A[s].T) @ B[s].T` with s the row's slot, by two matmuls over all slots' pages.

    Args:
      x: `[T, in]`, the rows.
      pages: the projection's adapters.
      slots: int32 `[T]`; a row whose slot is outside `0 .. S - 1` gets zeros.

    Returns:
      float32 `[T, out]`.
    """
    tokens, num_slots = x.shape[0], pages.table.shape[0]
    adapted = (slots >= 0) & (slots < num_slots)
    if num_slots <= tokens:  # a block of columns a slot
        table, scale = pages.table[:, 0], pages.scale[:, 0]
        uses_block = slots[:, None] == jnp.arange(num_slots, dtype=slots.dtype)[None, :]
    else:  # a block a row, for a bank of many slots and a batch of few rows
        of_row = jnp.where(adapted, slots, 0)
        table, scale = pages.table[of_row, 0], pages.scale[of_row, 0]
        uses_block = adapted[:, None] & jnp.eye(tokens, dtype=bool)
    page = jnp.arange(-(-pages.max_rank // RANK_PAGE), dtype=jnp.int32)[None, :]
    live = page < table[:, 2:3]

    def packed(pool: Array, first: Array) -> Array:
        """`[ranks, width]`: the blocks' pages one after the other, zeros (page 0) where a block has fewer."""
        return pool[jnp.where(live, first + page, 0).reshape(-1)].reshape(-1, pool.shape[-1]).astype(x.dtype)

    # Behind a barrier x is another value to XLA, which would merge this product into the base one and change its bits.
    hidden = matmul_t(lax.optimization_barrier(x), packed(pages.a, table[:, 0:1]))
    hidden = hidden.reshape(tokens, table.shape[0], -1) * scale[None, :, None]
    hidden = jnp.where(uses_block[:, :, None], hidden, 0.0).reshape(tokens, -1).astype(x.dtype)
    b = packed(pages.b, table[:, 1:2])
    return lax.optimization_barrier(matmul(hidden, b))
