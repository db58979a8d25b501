"""What a batch keeps between steps, as arrays that a jitted step takes and gives back.

Letters: B requests, T tokens of a request, M positions of the cache.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_moe_lora.errors import InputError
from jax_moe_lora.models.blocks.cache_places import LayerCache
from jax_moe_lora.models.blocks.registry import ATTENTION
from jax_moe_lora.models.specs.model import ModelConfig
from pallas_kernels.pytrees import pytree


@pytree
@dataclass(frozen=True)
class Cache:
    """What a batch keeps between steps.

    Attributes:
      layers: each layer's arrays by name, each `[B, ...]`: `k` and `v` `[B, M, G, hd]` of grouped-query attention
        (fewer places where a window needs no more), and what other blocks keep.
      lengths: int32 `[B]`, positions in use; 0 marks an unused row.
      max_length: static. M, the most tokens of a request.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int[Array, "B"]
    max_length: int = field(metadata={"static": True})


def init_cache(config: ModelConfig, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """An empty cache.

    Args:
      config: the model's.
      batch: B.
      max_length: M, prompt and answer together.
      dtype: of keys and values; what a block keeps in float32 stays so.
    """
    layers = tuple(
        ATTENTION[type(layer.attention)].init_cache(layer.attention, batch, max_length, dtype)
        for layer in config.layers
    )
    return Cache(layers, jnp.zeros(batch, jnp.int32), max_length)


def check_width(tokens: Int[Array, "B T"], cache: Cache) -> None:
    """Refuses prompts that are wider than a row of the cache, padding included."""
    if tokens.shape[1] > cache.max_length:
        raise InputError(f"tokens have {tokens.shape[1]} a row; the cache has room for {cache.max_length}.")
