"""Random adapters of one layer, repeatable by a seed, and their form for the reference."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jax_moe_lora.adapters.lora import EXPERT_MODULES, SHARED_OUTER, SIDES, LoRAAdapter, LoRAWeights, Side, uniform
from jax_moe_lora.arguments import number, sequence, whole
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.errors import InputError


def per_expert_adapter(
    config: MoEConfig,
    rank: int = 8,
    *,
    modules: Sequence[str] = EXPERT_MODULES,
    scale: float = 2.0,
    seed: int = 0,
    name: str = "per-expert",
) -> LoRAAdapter:
    """A random adapter in which each expert has an A and a B of its own.

    Args:
      config: the layer's sizes.
      rank: R.
      modules: some of `gate`, `up` and `down`.
      scale: the factor on B A.
      seed: the same seed gives the same numbers.
      name: what messages call it.

    Returns:
      The adapter of layer 0, float32: A normal with deviation `1 / sqrt(in)`, B with `1 / sqrt(R)`.

    Raises:
      InputError: an unknown module, or one that is named twice; a rank that is no positive whole number; a scale that
        is not finite.
    """
    return _random_adapter(config, rank, modules, {}, scale, seed, name)


def shared_adapter(
    config: MoEConfig,
    rank: int = 8,
    *,
    sides: Mapping[str, Side] = SHARED_OUTER,
    modules: Sequence[str] = EXPERT_MODULES,
    scale: float = 2.0,
    seed: int = 0,
    name: str = "shared",
) -> LoRAAdapter:
    """A random adapter in which all experts share one matrix per module, kept once (leading axis 1).

    Args:
      config: the layer's sizes.
      rank: R.
      sides: module -> the side that its experts share, `a` or `b`. By default the side at the hidden width: A of gate
        and of up, B of down. A module that it does not name has a matrix per expert on both sides.
      modules: some of `gate`, `up` and `down`.
      scale: the factor on B A.
      seed: the same seed gives the same numbers.
      name: what messages call it.

    Returns:
      The adapter of layer 0, float32, drawn as in `per_expert_adapter`.

    Raises:
      InputError: an unknown side or module; what `per_expert_adapter` refuses.
    """
    if not isinstance(sides, Mapping):
        raise InputError(f"sides are of type {type(sides).__name__}; expected module -> 'a' or 'b'.")
    for module, side in sides.items():
        if module not in EXPERT_MODULES:
            raise InputError(f"sides name {module!r}; expected some of {', '.join(EXPERT_MODULES)}.")
        if module not in modules and sides is not SHARED_OUTER:
            raise InputError(f"sides name {module!r}, which is none of the modules {', '.join(modules)}.")
        if side not in SIDES:
            raise InputError(f"The shared side of {module} is {side!r}; expected 'a' or 'b'.")
    return _random_adapter(config, rank, modules, sides, scale, seed, name)


def expand_shared(adapter: LoRAAdapter) -> LoRAAdapter:
    """The same adapter with a copy per expert of every matrix that all experts share.

    Args:
      adapter: it is not changed. Two modules that hold one array hold one array afterwards too.
    """
    copies: dict[tuple[int, int], np.ndarray] = {}

    def per_expert(side: np.ndarray, experts: int) -> np.ndarray:
        if len(side) == experts:
            return side
        return copies.setdefault((id(side), experts), np.repeat(side, experts, axis=0))

    weights = {
        key: replace(w, a=per_expert(w.a, len(w.ranks)), b=per_expert(w.b, len(w.ranks)))
        for key, w in adapter.weights.items()
    }
    return replace(adapter, weights=weights)


def for_reference(adapter: LoRAAdapter, layer: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One layer of an adapter as `torch_reference` takes it.

    Args:
      adapter: the adapter.
      layer: of which layer.

    Returns:
      Module -> A, B and the scales `[E]`. Ranks that an expert does not have are zeros.

    Raises:
      InputError: the adapter has a module in this layer that is no projection of the routed experts.
    """
    here = {module: weights for (index, module), weights in adapter.weights.items() if index == layer}
    for module in here:
        if module not in EXPERT_MODULES:
            raise InputError(
                f"Adapter {adapter.name!r} targets {module!r}, which torch_reference does not have; "
                f"expected some of {', '.join(EXPERT_MODULES)}."
            )
    return {module: (_live_ranks(weights), weights.b, weights.scale) for module, weights in here.items()}


def _live_ranks(weights: LoRAWeights) -> np.ndarray:
    """A, with zeros in place of the ranks that an expert lacks."""
    if (weights.ranks == weights.a.shape[1]).all():
        return weights.a
    live = np.arange(weights.a.shape[1])[None, :] < weights.ranks[:, None]
    return np.where(live[:, :, None], weights.a, np.zeros((), weights.a.dtype))


def _random_adapter(
    config: MoEConfig,
    rank: int,
    modules: Sequence[str],
    sides: Mapping[str, Side],
    scale: float,
    seed: int,
    name: str,
) -> LoRAAdapter:
    whole("rank", rank, 1)
    scale = number("scale", scale, math.isfinite, "a finite number")
    modules = sequence("modules", modules)
    for module in modules:
        if module not in EXPERT_MODULES:
            raise InputError(f"modules name {module!r}; expected some of {', '.join(EXPERT_MODULES)}.")
    if len({*modules}) < max(len(modules), 1):
        raise InputError(f"modules are {list(modules)}; expected some of {', '.join(EXPERT_MODULES)}, each once.")
    rng = np.random.default_rng(whole("seed", seed, 0, 2**63 - 1))
    weights: dict[tuple[int, str], LoRAWeights] = {}
    for module in modules:
        out_width, in_width = widths(config)[module]
        shapes: dict[Side, tuple[int, int]] = {"a": (rank, in_width), "b": (out_width, rank)}
        drawn: dict[Any, np.ndarray] = {}
        for side, shape in shapes.items():
            experts = 1 if sides.get(module) == side else config.num_experts
            drawn[side] = rng.standard_normal((experts, *shape), np.float32) * np.float32(shape[1] ** -0.5)
        weights[0, module] = uniform(drawn["a"], drawn["b"], scale, config.num_experts)
    return LoRAAdapter(name, weights)


def widths(config: MoEConfig) -> dict[str, tuple[int, int]]:
    """Module of the routed experts -> width of its results and of its rows."""
    d, f = config.hidden_size, config.expert_width
    return {"gate": (f, d), "up": (f, d), "down": (d, f)}
