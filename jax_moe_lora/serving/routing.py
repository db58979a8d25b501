"""The experts that tokens went to, as `generate` returns them, padded for a program."""

from typing import Any

import numpy as np

from jax_moe_lora.arguments import array, sequence
from jax_moe_lora.errors import InputError
from jax_moe_lora.models.specs.model import ModelConfig

NO_CHOICE = -1
"""The router chooses."""


def padded_routing(routing: Any, shape: tuple[int, int], config: ModelConfig) -> np.ndarray:
    """The experts of a batch of right-padded rows.

    Args:
      routing: B arrays of integers `[tokens, L, K]` for L routed layers, each of at most T tokens.
      shape: `(B, T)`.
      config: the model's.

    Returns:
      int32 `[B, T, L, K]`, `NO_CHOICE` where a row says nothing.

    Raises:
      InputError: another number of rows, another shape, or experts that the model does not have.
    """
    rows, width = shape
    wanted = len(config.routed_layers), config.moe.top_k
    given = list(sequence("routing", routing))
    if len(given) != rows:
        raise InputError(f"routing has {len(given)} rows; expected {rows}, one per row of token_ids.")
    padded = np.full((*shape, *wanted), NO_CHOICE, np.int32)
    for index, row in enumerate(given):
        name = f"routing[{index}]"
        experts = array(name, row)
        if experts.ndim != 3 or experts.shape[1:] != wanted or not np.issubdtype(experts.dtype, np.integer):
            raise InputError(
                f"{name} is {experts.dtype} {list(experts.shape)}; expected integers [tokens, {wanted[0]}, "
                f"{wanted[1]}]: routed layers and experts per token."
            )
        if len(experts) > width:
            raise InputError(f"{name} has {len(experts)} tokens; expected at most {width}, the width of token_ids.")
        if experts.size and not NO_CHOICE <= experts.min() <= experts.max() < config.moe.num_experts:
            raise InputError(
                f"{name} holds experts {experts.min()} to {experts.max()}; expected 0 to {config.moe.num_experts - 1}, "
                f"or {NO_CHOICE} where the router chooses."
            )
        padded[index, : len(experts)] = experts
    return padded
