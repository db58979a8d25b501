"""What the routers of a model decide for given tokens, layer by layer."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.arguments import is_array, sequence
from jax_moe_lora.config import RouterKind
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer.routing import expert_probabilities
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
      experts: int32 `[L, B, T, K]`, the chosen experts' ids, in the order of `weights`; zeros past a request's length.
      real: bool `[B, T]`, False past a request's length, where scores and weights are undefined.
      layers: the routed layers' numbers in the model.
      token_ids: int32 `[B, T]`, what was read, zeros past a request's length.
      router: the kind of the routers.
    """

    scores: Float[np.ndarray, "L B T E"]
    weights: Float[np.ndarray, "L B T K"]
    experts: Int[np.ndarray, "L B T K"]
    real: Bool[np.ndarray, "B T"]
    layers: tuple[int, ...]
    token_ids: Int[np.ndarray, "B T"]
    router: RouterKind = "softmax_topk"

    @property
    def num_experts(self) -> int:
        """E, the number of experts per layer."""
        return self.scores.shape[-1]

    @property
    def probabilities(self) -> Float[np.ndarray, "L B T E"]:
        """Each token's distribution over all experts, as the router makes it of its scores (`expert_probabilities`)."""
        rows = jnp.asarray(self.scores).reshape(-1, self.num_experts)
        return np.asarray(expert_probabilities(rows, self.router)).reshape(self.scores.shape)


def router_trace(
    model: Model,
    prompts: Sequence[str | Sequence[int]] | np.ndarray | Array,
    adapter_names: Sequence[str | Path | None] | None = None,
    lengths: Sequence[int] | None = None,
) -> Trace:
    """Records what each router decides for the tokens of prompts.

    The prompts are read once, by a program of its own: the programs that generate text stay compiled as they are.

    Args:
      model: the model, with its adapters.
      prompts: B texts or lists of token ids, as for `generate`; or integers `[B, T]`, padded on the right.
      adapter_names: B names of registered adapters, or folders of adapters, which are loaded for this call alone; None
        for the base model. None in place of the list uses the base model for all rows.
      lengths: B numbers of real tokens of an array; None means T for all rows.

    Returns:
      The scores, weights and experts of every routed layer.

    Raises:
      InputError: shapes disagree, or a token id or length is out of range.
      AdapterNameError: an adapter is not registered, and there is no folder of that name.
      AdapterFormatError: an adapter's files are not understood, or do not fit.
      BankFullError: the adapters need more slots than there are.
    """
    tokens, real = _tokens(model, prompts, lengths)
    names = [None] * len(tokens) if adapter_names is None else list(adapter_names)
    if len(names) != len(tokens):
        raise InputError(f"adapter_names has {len(names)} entries for {len(tokens)} rows; give one per row.")
    index = np.arange(tokens.shape[1], dtype=np.int32)[None]
    mask = index < real[:, None]
    static = {"config": model.config, "implementation": model.implementation}
    with _registered(model, names) as registered, model.hold(registered) as slots:
        row_slots = np.where(mask, np.asarray(slots)[:, None], BASE_SLOT).astype(np.int32)
        rows: list[Any] = [tokens, np.broadcast_to(index, tokens.shape), mask.astype(np.int32), row_slots]
        state = model.functional(*tokens.shape)
        traced = _trace(state.params, state.bank, *map(jnp.asarray, rows), **static)
        columns = (np.stack(parts).reshape(len(parts), *tokens.shape, -1) for parts in zip(*traced, strict=True))
        scores, weights, experts = columns
        experts = np.where(mask[None, ..., None], experts, 0)  # padding goes to no expert
    return Trace(
        scores, weights, experts, mask, model.config.routed_layers, np.where(mask, tokens, 0), model.config.moe.router
    )


def _tokens(model: Model, prompts: Any, lengths: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[B, T]` and the number of real ones in each row."""
    if is_array(prompts) or lengths is not None:
        return check_tokens(prompts, lengths, model.config)
    rows = [model.tokenizer.encode(row) if isinstance(row, str) else row for row in sequence("prompts", prompts)]
    counts = [len(sequence("a prompt", row)) for row in rows]
    width = max(counts, default=0)
    return check_tokens([[*row, *[0] * (width - len(row))] for row in rows], counts, model.config)


@contextmanager
def _registered(model: Model, names: Sequence[str | Path | None]) -> Iterator[list[str | None]]:
    """The names, each folder among them registered under its path until the block ends."""
    known = model.adapter_status
    folders = {str(name) for name in names if name is not None and str(name) not in known and os.path.isdir(name)}
    with ExitStack() as added:
        for folder in sorted(folders):
            model.register_adapter(folder, folder)
            added.callback(model.unload_adapter, folder)
        yield [None if name is None else str(name) for name in names]


@partial(jax.jit, static_argnames=("config", "implementation"))
def _trace(params, bank, tokens, positions, segments, slots, *, config, implementation):
    """(scores, weights, experts) of each routed layer, each `[B * T, ...]`."""
    options = {"config": config, "implementation": implementation, "keep_routing": True}
    _, routing = decoder.packed_hidden(params, bank, tokens, positions, segments, slots, **options)
    return [(of_layer.scores, of_layer.weights, of_layer.experts) for of_layer in routing]
