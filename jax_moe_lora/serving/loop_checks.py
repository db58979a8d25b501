"""What the functions of a loop of one's own refuse before they run, where values are known: outside of `jit`.

Letters: B rows of the cache, M positions of a row, N rows that a call names, T tokens of each, V vocabulary.
"""

from typing import Any

import jax
import numpy as np

from jax_moe_lora.adapters.addressable import fetch
from jax_moe_lora.arguments import is_traced
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer.checks import check_array
from jax_moe_lora.models.cache import Cache


def check_cache(cache: Any) -> None:
    """Refuses what is no cache, and a cache whose memory an earlier call has taken."""
    if not isinstance(cache, Cache):
        raise InputError(f"cache is of type {type(cache).__name__}; expected one that init_cache or a call returned.")
    taken = [leaf for leaf in jax.tree.leaves(cache) if isinstance(leaf, jax.Array) and not is_traced(leaf)]
    if any(leaf.is_deleted() for leaf in taken):
        raise InputError("cache was used up by an earlier call; give the cache that this call returned.")


def check_rows(cache: Cache, rows: Any) -> None:
    """Refuses rows that are named twice or lie below 0 or above B; B stands for no row, to pad calls with."""
    check_array("rows", rows, ("N",), "integers")
    if is_traced(rows):
        return
    named, batch = np.asarray(rows), cache.lengths.shape[0]
    real = named[named != batch]
    if (real < 0).any() or (real > batch).any():
        raise InputError(f"rows are {named.tolist()}; expected 0 to {batch - 1}, or {batch} for none.")
    if len(set(real.tolist())) < len(real):
        raise InputError(f"rows are {named.tolist()}; expected each row once.")


def check_prompts(tokens: Any, lengths: Any, count: int, vocab_size: int) -> None:
    """Refuses lengths that tokens do not have, and ids that are none of the vocabulary's.

    Args:
      tokens: int `[N, T]`, right-padded; padding may hold anything.
      lengths: int `[N]`.
      count: N.
      vocab_size: V.
    """
    check_array("tokens", tokens, (count, "T"), "integers")
    check_array("lengths", lengths, (count,), "integers")
    if is_traced(lengths):
        return
    real, width = np.asarray(lengths), tokens.shape[1]
    if (real < 0).any() or (real > width).any():
        raise InputError(f"lengths are {real.tolist()}; expected 0 to {width}, the width of tokens.")
    if is_traced(tokens):
        return
    ids = np.asarray(tokens)[np.arange(width)[None, :] < real[:, None]]
    if (ids < 0).any() or (ids >= vocab_size).any():
        raise InputError(f"tokens lie from {ids.min()} to {ids.max()}; expected ids of 0 to {vocab_size - 1}.")


def check_room(cache: Cache, rows: Any, lengths: Any, behind: bool) -> None:
    """Refuses tokens that a row has no room for.

    Args:
      cache: the running one.
      rows: int `[N]`.
      lengths: int `[N]`, tokens for each.
      behind: they come behind what a row holds, not in its place.
    """
    if any(map(is_traced, (cache.lengths, rows, lengths))):
        return
    most, batch = cache.max_length, cache.lengths.shape[0]
    real = np.asarray(rows) < batch
    before = fetch(cache.lengths)[np.asarray(rows)[real]] if behind else 0
    after = before + np.asarray(lengths)[real]
    if after.size and after.max() > most:
        raise InputError(
            f"lengths are {np.asarray(lengths).tolist()}; expected rows of at most {most} tokens, which would have "
            f"{after.tolist()}."
        )
