"""The adapters that every implementation of the layer is probed with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from jax_moe_lora.adapters.lora import EXPERT_MODULES, LoRAAdapter, LoRAWeights
from jax_moe_lora.arguments import whole
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.parity.adapters import per_expert_adapter, shared_adapter

Weights = Mapping[tuple[int, str], LoRAWeights]


@dataclass(frozen=True)
class Probe:
    """Adapters that share a batch.

    Attributes:
      name: what tables and figures call it.
      adapters: those in slots 0, 1, ...
      turn: the slots that the tokens take in turn; -1 is a base row.
    """

    name: str
    adapters: tuple[LoRAAdapter, ...]
    turn: tuple[int, ...] = (0,)

    def slots(self, tokens: int) -> np.ndarray:
        """int32 `[T]`: the slot of each token."""
        return np.resize(np.array(self.turn, np.int32), tokens)


def probes(config: MoEConfig, rank: int = 8, *, seed: int = 0) -> tuple[Probe, ...]:
    """Every kind of adapter that a routed layer may meet.

    No adapter; a zero adapter by its A, its B or both; each module, each pair of modules and all three, the other
    modules absent, or present with zeros; matrices and scales per expert; up aliased to gate; gate and up with one A
    (fused); sides that all experts share; ranks that differ by expert, and by adapter within a batch; base rows between
    others.

    Args:
      config: the layer's sizes.
      rank: R of the adapters; some probes have other ranks too.
      seed: the same seed gives the same adapters.

    Returns:
      The probes. They share arrays where they have the same numbers.

    Raises:
      InputError: a rank or seed that is no whole number.
    """
    whole("rank", rank, 1)
    adapter = per_expert_adapter(config, rank, seed=seed)
    per_expert = per_expert_adapter(config, rank, seed=seed + 1)
    shared = shared_adapter(config, rank, seed=seed + 2)
    fused = dict(adapter.weights)
    fused[0, "up"] = replace(fused[0, "up"], a=fused[0, "gate"].a)
    of_ranks = [
        per_expert_adapter(config, other, seed=seed + 3 + index, name=f"rank {other}")
        for index, other in enumerate(mixed_ranks(rank))
    ]
    listed = ", ".join(map(str, mixed_ranks(rank)))
    return (
        Probe("none", (), (-1,)),
        *_zeros(adapter),
        *_subsets(adapter),
        _probe("per-expert, scales too", _own_scales(per_expert.weights, seed)),
        _probe("up aliased to gate", {**adapter.weights, (0, "up"): adapter.weights[0, "gate"]}),
        _probe("fused: one A for gate and up", fused),
        _probe("shared: A of gate and up, B of down", shared.weights),
        _probe(f"ranks 0 to {rank}, by expert", _growing_ranks(adapter.weights, rank)),
        Probe(f"ranks {listed}, by row", tuple(of_ranks), tuple(range(len(of_ranks)))),
        Probe("half base rows", (adapter, shared), (0, -1, 1, -1)),
    )


def mixed_ranks(rank: int) -> tuple[int, int, int, int]:
    """Ranks that one batch mixes: a small one, the given one, one of more than a page, one of more than two."""
    return max(1, rank // 2), rank, rank + 16, rank + 32


def _probe(name: str, weights: Weights) -> Probe:
    return Probe(name, (LoRAAdapter(name, weights),))


def _zeros(adapter: LoRAAdapter) -> Iterator[Probe]:
    """An adapter that changes nothing, by either side or both."""
    for name, sides in {"A": ("a",), "B": ("b",), "A and B": ("a", "b")}.items():
        yield _probe(f"zero {name}", {key: _with_zeros(weights, *sides) for key, weights in adapter.weights.items()})


def _subsets(adapter: LoRAAdapter) -> Iterator[Probe]:
    """Each choice of modules, the other modules absent, and present with zeros."""
    for count in (1, 2):
        for chosen in combinations(EXPERT_MODULES, count):
            live = {(0, module): adapter.weights[0, module] for module in chosen}
            rest = {key: _with_zeros(w, "a", "b") for key, w in adapter.weights.items() if key not in live}
            name = " and ".join(chosen) if count > 1 else f"only {chosen[0]}"
            yield _probe(name, live)
            yield _probe(f"{name}, zeros elsewhere", live | rest)
    yield _probe("gate, up and down", adapter.weights)


def _with_zeros(weights: LoRAWeights, *sides: str) -> LoRAWeights:
    return replace(weights, **{side: np.zeros_like(getattr(weights, side)) for side in sides})


def _own_scales(weights: Weights, seed: int) -> Weights:
    """A scale per expert."""
    rng = np.random.default_rng(seed)
    return {key: replace(w, scale=rng.uniform(0.5, 2, len(w.scale)).astype(np.float32)) for key, w in weights.items()}


def _growing_ranks(weights: Weights, rank: int) -> Weights:
    """Ranks from 0 for the first expert to R for the last one."""
    some = next(iter(weights.values()))
    ranks = np.linspace(0, rank, len(some.ranks)).round().astype(np.int32)
    live = np.arange(rank)[None, :] < ranks[:, None]
    return {
        key: LoRAWeights(w.a * live[:, :, None], w.b * live[:, None, :], ranks, w.scale) for key, w in weights.items()
    }
