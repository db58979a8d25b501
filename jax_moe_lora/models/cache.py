"""Keys and values of a batch, as arrays that a jitted step takes and gives back.

Letters: B requests, T tokens of a request, M positions of the cache, G key/value heads, hd head width.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jax_moe_lora.config import ModelConfig
from jax_moe_lora.errors import InputError
from pallas_kernels.pytrees import pytree

KeyValues = tuple[Float[Array, "B M G hd"], Float[Array, "B M G hd"]]
"""One layer's keys and values."""


@pytree
@dataclass(frozen=True)
class Cache:
    """Keys and values of a batch.

    Attributes:
      k, v: for each layer `[B, M, G, hd]`. lengths: int32 `[B]`, positions in use; 0 marks an unused row.
    """

    k: tuple[Float[Array, "B M G hd"], ...]
    v: tuple[Float[Array, "B M G hd"], ...]
    lengths: Int[Array, "B"]


def init_cache(config: ModelConfig, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """An empty cache for `batch` requests of at most `max_length` tokens, prompt and answer together."""
    shape = (batch, max_length, config.num_kv_heads, config.head_dim)
    empty = tuple(jnp.zeros(shape, dtype) for _ in range(2 * config.num_layers))
    return Cache(empty[: config.num_layers], empty[config.num_layers :], jnp.zeros(batch, jnp.int32))


def check_width(tokens: Int[Array, "B T"], cache: Cache) -> None:
    """Refuses prompts that are wider than a row of the cache, padding included."""
    if tokens.shape[1] > (most := cache.k[0].shape[1]):
        raise InputError(f"tokens have {tokens.shape[1]} a row; the cache has room for {most}.")


def store(
    cache: KeyValues, k: Float[Array, "B T G hd"], v: Float[Array, "B T G hd"], place: Int[Array, "B T"] | None
) -> KeyValues:
    """The cache with new keys and values in it.

    Args:
      place: int32 `[B, T]`, position of each token, dropped where it is M or more; None for a prompt, which begins at
        position 0.
    """
    if place is None:
        new_k, new_v = (
            lax.dynamic_update_slice(old, new, (0, 0, 0, 0)) for old, new in zip(cache, (k, v), strict=True)
        )
    else:
        rows = jnp.arange(place.shape[0])[:, None]
        new_k, new_v = (old.at[rows, place].set(new, mode="drop") for old, new in zip(cache, (k, v), strict=True))
    return new_k, new_v
