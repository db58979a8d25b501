"""Rows of a running cache: prompts join it, grow in it and leave it, while the other rows go on.

Letters: B rows of the cache, M positions of a row, N rows that a call names, T tokens of each of these.
A row that is B or more is passed over, so that calls can be padded to a fixed N.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_moe_lora.layer.checks import check_array
from jax_moe_lora.models import decoder
from jax_moe_lora.models.blocks.context import Bank
from jax_moe_lora.models.cache import Cache, check_width, init_cache
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from pallas_kernels.ops import Implementation

Step = Callable[..., tuple[Cache, Array]]


def insert_rows(
    params: ModelParams,
    bank: Bank | None,
    cache: Cache,
    rows: Int[Array, "N"],
    tokens: Int[Array, "N T"],
    lengths: Int[Array, "N"],
    slots: Int[Array, "N"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
    read: Step = decoder.prefill,
) -> tuple[Cache, Float[Array, "N V"]]:
    """Reads prompts into rows of a cache, whatever the rows held before.

    Args:
      params: the weights.
      bank: the adapters.
      cache: the running one.
      rows: int32 `[N]`, where to, each row once.
      tokens: int32 `[N, T]`, right-padded prompts, T at most M.
      lengths: int32 `[N]`, real tokens of each.
      slots: int32 `[N]`, `BASE_SLOT` for the base model.
      config: the model's (static).
      implementation: a backend by name, or None for the best available (static).
      read: reads the prompts: `decoder.prefill`, or that function over a mesh (static).

    Returns:
      The cache, and float32 `[N, V]` logits after each prompt's last token.
    """
    check_array("rows", rows, (tokens.shape[0],), "integers")
    check_width(tokens, cache)
    alone = init_cache(config, tokens.shape[0], tokens.shape[1], params.embedding.dtype)
    alone, logits = read(params, bank, alone, tokens, lengths, slots, config=config, implementation=implementation)
    return put_rows(cache, rows, alone), logits


def append_rows(
    params: ModelParams,
    bank: Bank | None,
    cache: Cache,
    rows: Int[Array, "N"],
    tokens: Int[Array, "N T"],
    lengths: Int[Array, "N"],
    slots: Int[Array, "N"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
    read: Step = decoder.append,
) -> tuple[Cache, Float[Array, "N V"]]:
    """Reads further tokens into rows behind what they hold: the next chunk of a long prompt, or of a conversation.

    Args:
      params: the weights.
      bank: the adapters.
      cache: the running one.
      rows: int32 `[N]`, where to, each row once.
      tokens: int32 `[N, T]`, right-padded.
      lengths: int32 `[N]`, real tokens of each; what a row has no room for is dropped.
      slots: int32 `[N]`, `BASE_SLOT` for the base model.
      config: the model's (static).
      implementation: a backend by name, or None for the best available (static).
      read: reads the tokens: `decoder.append`, or that function over a mesh (static).

    Returns:
      The cache, and float32 `[N, V]` logits after each row's last token.
    """
    check_array("rows", rows, (tokens.shape[0],), "integers")
    taken = take_rows(cache, rows)
    taken, logits = read(params, bank, taken, tokens, lengths, slots, config=config, implementation=implementation)
    return put_rows(cache, rows, taken), logits


def free_rows(cache: Cache, rows: Int[Array, "N"]) -> Cache:
    """Gives rows up: they cost nothing in the experts from now on.

    Args:
      cache: the running one.
      rows: int32 `[N]`.

    Returns:
      The cache.
    """
    return replace(cache, lengths=cache.lengths.at[_known(cache, rows)].set(0, mode="drop"))


def take_rows(cache: Cache, rows: Int[Array, "N"]) -> Cache:
    """A cache of these rows alone; a row that the cache does not have is an unused one."""
    known = _known(cache, rows)
    return jax.tree.map(lambda leaf: leaf.at[known].get(mode="fill", fill_value=0), cache)


def put_rows(cache: Cache, rows: Int[Array, "N"], new: Cache) -> Cache:
    """The cache with everything that these rows hold replaced; where `new` has fewer positions, the rest is zeros.

    What a row held before may not be finite, and an attention weight of zero would not hide it.
    """
    known = _known(cache, rows)

    def put(old: Array, of_rows: Array) -> Array:
        missing = [(0, 0), *((0, there - here) for there, here in zip(old.shape[1:], of_rows.shape[1:], strict=True))]
        return old.at[known].set(jnp.pad(of_rows, missing).astype(old.dtype), mode="drop")

    layers = jax.tree.map(put, cache.layers, new.layers)
    return replace(cache, layers=layers, lengths=cache.lengths.at[known].set(new.lengths, mode="drop"))


def _known(cache: Cache, rows: Int[Array, "N"]) -> Int[Array, "N"]:
    """The rows, and B for those that the cache does not have: jax would count negative ones from the end."""
    batch = cache.lengths.shape[0]
    return jnp.where((rows < 0) | (rows > batch), batch, rows)
