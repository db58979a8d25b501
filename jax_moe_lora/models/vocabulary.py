"""The two projections of the vocabulary: embedding and head, each with the adapters of its rows.

Both stand outside of the layers. Their adapters are those of layer L, behind the last one (`sites.py`). With s a row's
slot, c its scale, and A, B its adapter's matrices:

    embed:  W[id] + c * A[s][:, id] @ B[s].T           (as PEFT: A is looked up, not multiplied)
    head:   x @ W.T + c * (x @ A[s].T) @ B[s].T        (W is the embedding where the two are tied)

An adapter may bring a whole matrix in place of W instead (`adapters/replacements.py`): every row has the product with
the model's W, and the rows of such an adapter take another product's in its place.

An adapter of one changes that one alone, tied or not. A page of the vocabulary's width is large (16 * V), so pages are
not gathered slot by slot where a product with the whole pool is smaller.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.replacements import Replacements
from jax_moe_lora.layer.linear import lora_linear
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from pallas_kernels.ops import RANK_PAGE, LayerPages, LoRAPages
from pallas_kernels.xla.dot import matmul, matmul_t

EMBEDDING, HEAD = "embedding", "head"


def embed(
    params: ModelParams,
    adapters: LayerPages,
    tokens: Int[Array, "B T"],
    slots: Int[Array, "N"],
    config: ModelConfig,
    replacements: Replacements | None = None,
) -> Float[Array, "B T D"]:
    """The tokens' hidden rows.

    Args:
      params: the model.
      adapters: the pages of layer L.
      tokens: int `[B, T]`, token ids.
      slots: int32 `[B * T]`, adapter slot of each token, `BASE_SLOT` for none.
      config: the model's, of which the factor on embeddings is used (static).
      replacements: whole matrices that some slots have in place of the model's; None for none.

    Returns:
      `[B, T, D]` in the model's dtype; rows without an adapter have the embedding's own bits.
    """
    rows = params.embedding[tokens]
    if replacements is not None:
        of_row = replacements.of_rows(EMBEDDING, slots).reshape(tokens.shape)[..., None]
        for index, matrix in enumerate(replacements.matrices):
            rows = jnp.where(of_row == index, matrix[tokens].astype(rows.dtype), rows)
    pages = adapters.get(EMBEDDING)
    if pages is not None:
        rows = _adapted_rows(rows, pages, tokens, slots)
    if config.embedding_scale == 1.0:
        return rows
    return (rows.astype(jnp.float32) * config.embedding_scale).astype(rows.dtype)


def _adapted_rows(
    rows: Float[Array, "B T D"], pages: LoRAPages, tokens: Int[Array, "B T"], slots: Int[Array, "N"]
) -> Float[Array, "B T D"]:
    blocks = _Blocks.of(pages, slots)
    values = pages.a[blocks.row_pages(0), :, tokens.reshape(-1)[:, None]].astype(jnp.float32)
    update = _times_b(values * blocks.row_scale[:, None, None], pages.b, blocks, rows.dtype)
    flat = rows.reshape(-1, rows.shape[-1]).astype(jnp.float32) + update
    return flat.astype(rows.dtype).reshape(rows.shape)


def head(
    params: ModelParams,
    hidden: Float[Array, "B T D"],
    config: ModelConfig,
    adapters: LayerPages | None = None,
    slots: Int[Array, "N"] | None = None,
    replacements: Replacements | None = None,
) -> Float[Array, "B T V"]:
    """Float32 logits over the vocabulary.

    Args:
      params: the model.
      hidden: `[B, T, D]`, rows after the last norm.
      config: the model's, of which what becomes of logits is used (static).
      adapters: the pages of layer L, or None for the base model's head.
      slots: int32 `[B * T]`, adapter slot of each row; with `adapters` or `replacements`.
      replacements: whole matrices that some slots have in place of the model's; None for none.

    Returns:
      `[B, T, V]`; rows without an adapter have the bits of the base model's logits.
    """
    weight = params.embedding if params.head is None else params.head
    x = hidden.reshape(-1, hidden.shape[-1])
    pages = None if adapters is None else adapters.get(HEAD)
    y = lora_linear(x, weight, params.head_bias)
    if replacements is not None and slots is not None:
        y = _replaced_logits(y, x, replacements, slots, params.head_bias)
    if pages is not None and slots is not None:
        blocks = _Blocks.of(pages, slots)
        ranks = blocks.pages(0).shape[1] * RANK_PAGE
        # Behind a barrier x is another value to XLA, which would merge this product into the base one.
        products = matmul_t(lax.optimization_barrier(x), _rows(pages.a, blocks.pages(0), x.dtype))
        products = products.reshape(x.shape[0], -1, ranks)
        values = jnp.take_along_axis(products, blocks.of_row[:, None, None], axis=1)[:, 0]
        values = jnp.where(blocks.adapted[:, None], values * blocks.row_scale[:, None], 0.0)
        y = y + _times_b(values.reshape(x.shape[0], -1, RANK_PAGE), pages.b, blocks, x.dtype)
        y = lax.optimization_barrier(y)
    return finish_logits(y, config).reshape(*hidden.shape[:-1], -1)


def _replaced_logits(
    y: Float[Array, "N V"],
    x: Float[Array, "N D"],
    replacements: Replacements,
    slots: Int[Array, "N"],
    bias: Float[Array, "V"] | None,
) -> Float[Array, "N V"]:
    """`y`, and the product with its own matrix in each row that has one."""
    of_row = replacements.of_rows(HEAD, slots)[:, None]
    for index, matrix in enumerate(replacements.matrices):
        # One product after the other, and each of another value to XLA, which would merge it with the base one.
        y, x = lax.optimization_barrier((y, x))
        whole = lora_linear(x, matrix.astype(x.dtype), bias)
        y = jnp.where(of_row == index, whole, y)
    return lax.optimization_barrier(y)


def finish_logits(y: Float[Array, "N V"], config: ModelConfig) -> Float[Array, "N V"]:
    """Logits after the model's factor and soft-cap.

    Args:
      y: float32 `[N, V]`, the head's product.
      config: the model's.
    """
    if config.logit_scale != 1.0:
        y = y * config.logit_scale
    if config.logit_softcap is not None:
        y = config.logit_softcap * jnp.tanh(y / config.logit_softcap)
    return y


@dataclass(frozen=True)
class _Blocks:
    """The adapters that a call may use: all slots, or for many slots and few rows each row's own.

    Attributes:
      table: int32 `[blocks, 4]`, as in `LoRAPages.table`.
      scale: float32 `[blocks]`.
      of_row: int32 `[N]`, the block of each row; any for a base row.
      adapted: bool `[N]`, whether the row has a slot.
      max_pages: pages of the largest rank.
    """

    table: Int[Array, "blocks 4"]
    scale: Float[Array, "blocks"]
    of_row: Int[Array, "N"]
    adapted: Array
    max_pages: int

    @classmethod
    def of(cls, pages: LoRAPages, slots: Int[Array, "N"]) -> "_Blocks":
        num_slots = pages.table.shape[0]
        adapted = (slots >= 0) & (slots < num_slots)
        table, scale, of_row = pages.table[:, 0], pages.scale[:, 0], jnp.where(adapted, slots, 0)
        if num_slots > slots.shape[0]:
            table, scale, of_row = table[of_row], scale[of_row], jnp.arange(slots.shape[0], dtype=of_row.dtype)
        return cls(table, scale, of_row, adapted, -(-pages.max_rank // RANK_PAGE))

    def pages(self, side: int) -> Int[Array, "blocks P"]:
        """The pages of A (0) or B (1) of each block, page 0 (zeros) where it has fewer."""
        page = jnp.arange(self.max_pages, dtype=jnp.int32)[None, :]
        return jnp.where(page < self.table[:, 2:3], self.table[:, side, None] + page, 0)

    def row_pages(self, side: int) -> Int[Array, "N P"]:
        """The pages of each row, page 0 for a base row."""
        return jnp.where(self.adapted[:, None], self.pages(side)[self.of_row], 0)

    @property
    def row_scale(self) -> Float[Array, "N"]:
        return self.scale[self.of_row]


def _rows(pool: Float[Array, "N_pool 16 width"], pages: Int[Array, "blocks P"], dtype) -> Float[Array, "ranks width"]:
    return pool[pages.reshape(-1)].reshape(-1, pool.shape[2]).astype(dtype)


def _times_b(
    values: Float[Array, "N P 16"], pool: Float[Array, "N_pool 16 out"], blocks: _Blocks, dtype
) -> Float[Array, "N out"]:
    """Float32 `values @ B.T` of each row's own adapter: zeros stand for the other adapters' ranks."""
    rows, num_blocks = values.shape[0], blocks.table.shape[0]
    if pool.shape[0] <= num_blocks * blocks.max_pages:
        # All pages of the pool, as they lie. Dead pages are page 0, and their values are zeros.
        wide = jnp.zeros((rows, pool.shape[0], RANK_PAGE), values.dtype)
        wide = wide.at[jnp.arange(rows)[:, None], blocks.row_pages(1)].set(values)
        b = pool.reshape(-1, pool.shape[2]).astype(dtype)
    else:
        uses = blocks.adapted[:, None] & (blocks.of_row[:, None] == jnp.arange(num_blocks)[None, :])
        wide = jnp.where(uses[:, :, None, None], values[:, None], 0.0)
        b = _rows(pool, blocks.pages(1), dtype)
    return lax.optimization_barrier(matmul(wide.reshape(rows, -1).astype(dtype), b))
