"""One LoRA adapter on the host: what a file held, with every on-disk convention resolved."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

Side = Literal["a", "b"]
SIDES: tuple[Side, ...] = get_args(Side)
EXPERT_MODULES = ("gate", "up", "down")
"""The projections of the routed experts."""
SHARED_OUTER: Mapping[str, Side] = {"gate": "a", "up": "a", "down": "b"}
"""Module -> the side that touches the hidden width, of which the shared-outer layout has one matrix for all experts."""


@dataclass(frozen=True)
class Site:
    """A projection that adapters may target: one module of a family, over the layers that have it.

    Attributes:
      in_width, out_width: width of the input and output rows.
      num_experts: E for a projection of the routed experts, 1 for a dense one.
      layers: indices of the layers that have the module.
    """

    in_width: int
    out_width: int
    num_experts: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class LoRAWeights:
    """A and B of one projection in one layer: `delta W[e] = scale[e] * B[e] @ A[e]`.

    A side whose leading axis is 1 is shared by all experts; it stays one array here and one page in the bank. Two
    projections that alias a matrix (gate and up with one A) hold the same array object.

    Attributes:
      a: `[E or 1, R, in]`; b: `[E or 1, out, R]`, R the largest rank of any expert, the unused rest zero.
      ranks: int32 `[E]`, each expert's own rank; 0 where the file has nothing for an expert (its delta is zero).
      scale: float32 `[E]`, alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.
    """

    a: np.ndarray
    b: np.ndarray
    ranks: np.ndarray
    scale: np.ndarray

    @property
    def max_rank(self) -> int:
        return int(self.ranks.max(initial=0))

    def delta(self, expert: int) -> np.ndarray:
        """Float32 `[out, in]`: the dense update of one expert's weight. For tests and merging, not for serving."""
        rank = int(self.ranks[expert])
        a = self.a[0 if self.a.shape[0] == 1 else expert, :rank].astype(np.float32)
        b = self.b[0 if self.b.shape[0] == 1 else expert, :, :rank].astype(np.float32)
        return float(self.scale[expert]) * (b @ a)


@dataclass(frozen=True)
class LoRAAdapter:
    """One adapter as loaded, in host memory.

    Attributes:
      name: for messages; the name that requests use is given when it is loaded into a model.
      weights: `(layer, module) -> LoRAWeights`, modules named as the family's sites (`gate`, `up`, `down`, `router`,
        `q`, `k`, `v`, `o`, `mlp_gate`, `mlp_up`, `mlp_down`, `shared_gate`, `shared_up`, `shared_down`,
        `shared_expert_gate`).
      source: what the adapter's own config said, kept for inspection and for writing it back.
      layout: the on-disk layout that it was read from; empty where it was made in memory.
    """

    name: str
    weights: Mapping[tuple[int, str], LoRAWeights]
    source: Mapping[str, Any] = field(default_factory=dict)
    layout: str = ""

    @property
    def max_rank(self) -> int:
        return max((w.max_rank for w in self.weights.values()), default=0)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(sorted({module for _, module in self.weights}))

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Module -> the ranks that occur in it."""
        return {
            module: tuple(sorted({int(r) for (_, m), w in self.weights.items() if m == module for r in w.ranks}))
            for module in self.modules
        }


def uniform(a: np.ndarray, b: np.ndarray, scale: float, num_experts: int) -> LoRAWeights:
    """`LoRAWeights` whose experts all have one rank and one scale.

    Args:
      a: `[E or 1, R, in]`; b: `[E or 1, out, R]`.
    """
    return LoRAWeights(
        a=a,
        b=b,
        ranks=np.full(num_experts, a.shape[1], np.int32),
        scale=np.full(num_experts, scale, np.float32),
    )
