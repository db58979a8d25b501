"""What the routers of a model decide for given tokens, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.errors import InputError
from jax_moe_lora.layer.routing import route
from jax_moe_lora.models import decoder
from jax_moe_lora.serving.model import Model
from jax_moe_lora.serving.requests import check_tokens
from pallas_kernels.ops import BASE_SLOT


@dataclass(frozen=True)
class Trace:
    """The routers' decisions as numpy arrays, for L routed layers.

    Attributes:
      scores: float32 `[L, B, T, E]`, the routers' outputs before any softmax, adapters included.
      weights: float32 `[L, B, T, K]`, the weight of each chosen expert, largest first.
      experts: int32 `[L, B, T, K]`, the chosen experts' ids, in the order of `weights`.
      real: bool `[B, T]`, False past a request's length, where the other arrays are undefined.
      layers: the routed layers' numbers in the model.
    """

    scores: Float[np.ndarray, "L B T E"]
    weights: Float[np.ndarray, "L B T K"]
    experts: Int[np.ndarray, "L B T K"]
    real: Bool[np.ndarray, "B T"]
    layers: tuple[int, ...]

    @property
    def num_experts(self) -> int:
        """E, the number of experts per layer."""
        return self.scores.shape[-1]

    @property
    def probabilities(self) -> Float[np.ndarray, "L B T E"]:
        """Softmax of the scores over all experts."""
        return np.asarray(jax.nn.softmax(jnp.asarray(self.scores), axis=-1))


def router_trace(
    model: Model,
    token_ids: Sequence[Sequence[int]] | np.ndarray | Array,
    adapter_names: Sequence[str | None] | None = None,
    lengths: Sequence[int] | None = None,
) -> Trace:
    """Records what each router decides for right-padded prompts.

    The prompts are read once, by a program of its own: the programs that generate text stay compiled as they are.

    Args:
      model: the model, with its adapters.
      token_ids: integers `[B, T]`, padded on the right.
      adapter_names: B names of loaded adapters, None for the base model; None uses the base model for all rows.
      lengths: B numbers of real tokens; None means T for all rows.

    Returns:
      The scores, weights and experts of every routed layer.

    Raises:
      InputError: shapes disagree, or a token id or length is out of range.
      AdapterNameError: an adapter is unknown or not loaded into a slot.
    """
    tokens, real = check_tokens(token_ids, lengths, model.config)
    names = [None] * len(tokens) if adapter_names is None else list(adapter_names)
    if len(names) != len(tokens):
        raise InputError(f"adapter_names has {len(names)} entries for {len(tokens)} rows; give one per row.")
    state = model.functional(*tokens.shape)
    index = np.arange(tokens.shape[1], dtype=np.int32)[None]
    mask = index < real[:, None]
    slots = np.where(mask, np.asarray(model.slots(names))[:, None], BASE_SLOT).astype(np.int32)
    rows: list[Any] = [tokens, np.broadcast_to(index, tokens.shape), mask.astype(np.int32), slots]
    static = {"config": model.config, "implementation": model.implementation}
    traced = _trace(state.params, state.bank, *map(jnp.asarray, rows), **static)
    columns = (np.stack(parts).reshape(len(parts), *tokens.shape, -1) for parts in zip(*traced, strict=True))
    scores, weights, experts = columns
    routed = tuple(layer for layer, is_routed in enumerate(model.config.moe_layers) if is_routed)
    return Trace(scores, weights, experts, mask, routed)


@partial(jax.jit, static_argnames=("config", "implementation"))
def _trace(params, bank, tokens, positions, segments, slots, *, config, implementation):
    """(scores, weights, experts) of each routed layer, each `[B * T, ...]`."""
    options = {"config": config, "implementation": implementation, "keep_scores": True}
    _, scores = decoder.packed_hidden(params, bank, tokens, positions, segments, slots, **options)
    return [(of_layer, *route(of_layer, config.moe)) for of_layer in scores]
