"""Attention to latents with the matrices that would make keys and values of them absorbed into its two sides.

A head's key is `W_k @ latent`, so `q . key = (W_k.T @ q) . latent`; its value is `W_v @ latent`, so the weighted sum of
values is `W_v` times the weighted sum of latents. With a request's adapter, `W + scale * B @ A`, both products get a
low-rank term of their own: `A.T @ (B_k.T @ q)` and `B_v @ (A @ latent)`. No matrix of a slot is ever made dense.
Letters: B requests, T tokens of a request, M positions of the cache, H heads, C width of the latent, n and v widths of
a head's keys and values, S blocks of pages side by side, R ranks of a block.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.layer.packed_update import MAX_PACKED_RANKS
from pallas_kernels.ops import LoRAPages
from pallas_kernels.pages import RANK_PAGE


@dataclass(frozen=True)
class HeadPages:
    """The adapters of `kv_b` as seen by one side of the attention.

    Attributes:
      a: `[S, R, C]`, or `[B, 1, R, C]` where each request has a block of its own.
      b: likewise, `[S, R, H, width]` with the rows of keys, or of values, of each head.
      scale: float32 `[S]`, or `[B, 1]`.
      uses: bool `[B, S]`, the block of each request.
    """

    a: Float[Array, "..."]
    b: Float[Array, "..."]
    scale: Float[Array, "..."]
    uses: Bool[Array, "B S"]

    @property
    def block(self) -> str:
        """What indexes a block, in the terms of `einsum`."""
        return "s" if self.a.ndim == 3 else "bs"

    def shrunk(self, hidden: Float[Array, "B T H S R"], dtype: Any) -> Float[Array, "B T H S R"]:
        """Rows behind the first of the two matrices: scaled, and zeros in blocks that are not the request's."""
        scale = self.scale.reshape(-1, self.scale.shape[-1])[:, None, None, :, None]
        return jnp.where(self.uses[:, None, None, :, None], hidden * scale, 0.0).astype(dtype)


def kv_b_adapters(
    pages: LoRAPages | None, slots: Int[Array, "B"], num_heads: int, nope_dim: int, dtype: Any
) -> tuple[HeadPages | None, HeadPages | None]:
    """The adapters of `kv_b` for a step, of its keys and of its values.

    All slots' pages stand side by side where they are few, as in `layer.packed_update`; else each request has its own.
    Which one follows from shapes alone, and a request meets its own pages in their own order in both.

    Args:
      pages: of the projection, or None for none.
      slots: int32 `[B]`, of each request; one that the bank does not have is a base row.
      num_heads: H.
      nope_dim: n.
      dtype: of the rows.
    """
    if pages is None:
        return None, None
    num_slots, count = pages.table.shape[0], -(-pages.max_rank // RANK_PAGE)
    adapted = (slots >= 0) & (slots < num_slots)
    packed = num_slots <= slots.shape[0] and num_slots * count * RANK_PAGE <= MAX_PACKED_RANKS
    blocks = jnp.arange(num_slots, dtype=slots.dtype) if packed else jnp.where(adapted, slots, 0)
    uses = slots[:, None] == blocks[None, :] if packed else adapted[:, None]
    table, scale = pages.table[blocks, 0], pages.scale[blocks, 0]
    page = jnp.arange(count, dtype=jnp.int32)[None, :]

    def ranks(pool: Array, first: Array) -> Array:
        """`[blocks, R, width]`; zeros (page 0) where a block has fewer pages."""
        rows = pool[jnp.where(page < table[:, 2:3], first + page, 0)].astype(dtype)
        return rows.reshape(rows.shape[0], count * RANK_PAGE, rows.shape[-1])

    a, b = ranks(pages.a, table[:, 0:1]), ranks(pages.b, table[:, 1:2])
    b = b.reshape(*b.shape[:2], num_heads, -1)
    if not packed:
        a, b, scale = a[:, None], b[:, None], scale[:, None]
    of_keys, of_values = jnp.split(b, [nope_dim], axis=-1)
    return HeadPages(a, of_keys, scale, uses), HeadPages(a, of_values, scale, uses)


def to_latents(
    q: Float[Array, "B T H n"], weight: Float[Array, "H n C"], pages: HeadPages | None
) -> Float[Array, "B T H C"]:
    """Queries that meet latents in place of keys, in q's dtype.

    Args:
      q: queries.
      weight: what makes keys of latents.
      pages: its adapters, or None.
    """
    y = lax.optimization_barrier(_product("bthn,hnc->bthc", q, weight))
    if pages is not None:
        # Behind a barrier q is another value to XLA, which would merge the two products and change the base one's bits.
        hidden = _product(f"bthn,{pages.block}rhn->bthsr", lax.optimization_barrier(q), pages.b)
        update = _product(f"bthsr,{pages.block}rc->bthc", pages.shrunk(hidden, q.dtype), pages.a)
        y = lax.optimization_barrier(y + lax.optimization_barrier(update))
    return y.astype(q.dtype)


def from_latents(
    mixed: Float[Array, "B T H C"], weight: Float[Array, "H v C"], pages: HeadPages | None
) -> Float[Array, "B T H v"]:
    """Values of mixed latents, in their dtype.

    Args:
      mixed: weighted sums of latents.
      weight: what makes values of latents.
      pages: its adapters, or None.
    """
    y = lax.optimization_barrier(_product("bthc,hvc->bthv", mixed, weight))
    if pages is not None:
        hidden = _product(f"bthc,{pages.block}rc->bthsr", lax.optimization_barrier(mixed), pages.a)
        update = _product(f"bthsr,{pages.block}rhv->bthv", pages.shrunk(hidden, mixed.dtype), pages.b)
        y = lax.optimization_barrier(y + lax.optimization_barrier(update))
    return y.astype(mixed.dtype)


def attend_latents(
    q: Float[Array, "B T H C"],
    turned_q: Float[Array, "B T H r"],
    latents: Float[Array, "B M C"],
    keys: Float[Array, "B M r"],
    seen: Bool[Array, "B T M"],
    scale: float,
) -> Float[Array, "B T H C"]:
    """Weighted sums of the latents that each token sees, in q's dtype; the softmax is in float32.

    Args:
      q: queries of the part without position, from `to_latents`.
      turned_q: queries of the part with position.
      latents: the cache's.
      keys: the cache's.
      seen: one at least for each token. What is not seen must be finite: it is multiplied by zero.
      scale: factor on the scores.
    """
    latents, keys = latents.astype(q.dtype), keys.astype(q.dtype)
    scores = _product("bthc,bmc->bthm", q, latents) + _product("bthr,bmr->bthm", turned_q, keys)
    scores = jnp.where(seen[:, :, None, :], scores * scale, -jnp.inf)
    shares = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    shares = shares / shares.sum(axis=-1, keepdims=True)
    return _product("bthm,bmc->bthc", shares.astype(q.dtype), latents).astype(q.dtype)


def _product(terms: str, x: Array, y: Array) -> Array:
    """`einsum` with float32 sums; float32 inputs are multiplied as float32 (never TF32)."""

    def wide(x: Array, y: Array) -> Array:
        return jnp.einsum(terms, x.astype(jnp.float32), y.astype(jnp.float32), precision=lax.Precision.HIGHEST)

    def narrow(x: Array, y: Array) -> Array:
        return jnp.einsum(terms, x, y, preferred_element_type=jnp.float32)

    if x.dtype == jnp.float32:
        return wide(x, y)
    # XLA for a CPU has no batched product of 16-bit numbers; the products themselves are exact in float32.
    return lax.platform_dependent(x, y, cpu=wide, default=narrow)
