"""One LoRA adapter on the host: what a file holds, with every on-disk convention resolved."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from jax_moe_lora.arguments import host_array, is_torch, is_traced
from jax_moe_lora.errors import InputError

Side = Literal["a", "b"]
SIDES: tuple[Side, ...] = get_args(Side)
EXPERT_MODULES = ("gate", "up", "down")
"""The projections of the routed experts."""
SHARED_OUTER: Mapping[str, Side] = {"gate": "a", "up": "a", "down": "b"}
"""Module -> the side that touches the hidden width, of which the shared-outer layout has one matrix for all experts."""
REPLACEABLE = ("embedding", "head")
"""The modules that an adapter may replace as a whole."""
TRACED = (
    "is traced by jax's jit or grad, but adapters are put into a bank on the host, outside of both; to train them, "
    "differentiate the bank's pages: the LoRAParam of jax_moe_lora.nn.MoELoRA, or use jax_moe_lora.training."
)
"""What to do instead of differentiating `insert`."""


@dataclass(frozen=True)
class SplitWidth:
    """Pages of one width that are split over a mesh of devices in one way, and so lie in a pool of their own.

    Attributes:
      width: of the whole rows.
      parts: so many devices have a part of each row.
      axes: the mesh axes of these devices.
      regions: the pool is cut into so many regions, each with a page 0 of its own. The pages of an expert lie in the
        region of the devices that have the expert.
      region_axes: the mesh axes of the regions.
    """

    width: int
    parts: int = 1
    axes: tuple[str, ...] = ()
    regions: int = 1
    region_axes: tuple[str, ...] = ()

    def __int__(self) -> int:
        return self.width

    def __str__(self) -> str:
        """The name of its pool."""
        return f"{self.width}/{'+'.join(self.axes)}/{'+'.join(self.region_axes)}"


PoolWidth = int | SplitWidth
"""What one pool of a bank holds pages of: rows of a width, on one device or split over several."""


@dataclass(frozen=True)
class Site:
    """A projection that adapters may target: one module of a family, over the layers that have it.

    Attributes:
      in_width: width of the input rows.
      out_width: width of the output rows.
      num_experts: E for a projection of the routed experts, 1 for a dense one.
      layers: indices of the layers that have the module.
      split: the pools of its A and its B where the bank is on a mesh; None where each device has all of them.
    """

    in_width: int
    out_width: int
    num_experts: int
    layers: tuple[int, ...]
    split: tuple[SplitWidth, SplitWidth] | None = None

    @property
    def pools(self) -> tuple[PoolWidth, PoolWidth]:
        """The pools of its A and its B."""
        return self.split or (self.in_width, self.out_width)

    @property
    def regions(self) -> int:
        """Regions that its experts are spread over."""
        return self.split[0].regions if self.split else 1


@dataclass(frozen=True)
class LoRAWeights:
    """A and B of one projection in one layer: `delta W[e] = scale[e] * B[e] @ A[e]`.

    A side whose leading axis is 1 is shared by all experts; it stays one array here and one page in the bank. Two
    projections that alias a matrix (gate and up with one A) hold the same array, or views of the same memory.

    Arrays of jax, tensors of torch, and lists become arrays of numpy. A torch tensor on a GPU is copied each time it is
    given, so one that two projections share becomes two arrays: move it to the CPU first to keep it one.

    Attributes:
      a: `[E or 1, R, in]`, floating point.
      b: `[E or 1, out, R]`, R the largest rank of any expert, the unused rest zero.
      ranks: int32 `[E]`, each expert's own rank; 0 where the file has nothing for an expert (its delta is zero).
      scale: float32 `[E]`, alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA.

    Raises:
      InputError: what numpy cannot view as an array, or numbers of another kind.
    """

    a: np.ndarray
    b: np.ndarray
    ranks: np.ndarray
    scale: np.ndarray

    def __post_init__(self):
        numbers = {"a": "floating point", "b": "floating point", "ranks": "integers", "scale": "real numbers"}
        for name, expected in numbers.items():
            object.__setattr__(self, name, _host_array(name, getattr(self, name), expected))

    @property
    def max_rank(self) -> int:
        return int(self.ranks.max(initial=0))

    def delta(self, expert: int) -> np.ndarray:
        """The dense update of one expert's weight. For tests and merging, not for serving.

        Args:
          expert: its number.

        Returns:
          float32 `[out, in]`.
        """
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
      replacements: `embedding` or `head` -> the whole matrix `[V, D]` that stands in place of the model's. Where both
        hold the same array it is one matrix in a bank.
    """

    name: str
    weights: Mapping[tuple[int, str], LoRAWeights]
    source: Mapping[str, Any] = field(default_factory=dict)
    layout: str = ""
    replacements: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        for key, weights in self.weights.items():
            if not (isinstance(key, tuple) and len(key) == 2 and isinstance(weights, LoRAWeights)):
                raise InputError(
                    f"Adapter {self.name!r} has {type(weights).__name__} under {key!r}; expected LoRAWeights under "
                    "(layer, module)."
                )
        matrices = {
            module: _host_array(f"the {module}", matrix, "floating point", "a replacement")
            for module, matrix in self.replacements.items()
        }
        object.__setattr__(self, "replacements", matrices)

    @property
    def max_rank(self) -> int:
        return max((w.max_rank for w in self.weights.values()), default=0)

    @property
    def modules(self) -> tuple[str, ...]:
        """Those that it changes by LoRA."""
        return tuple(sorted({module for _, module in self.weights}))

    @property
    def ranks(self) -> dict[str, tuple[int, ...]]:
        """Module -> the ranks that occur in it."""
        return {
            module: tuple(sorted({int(r) for (_, m), w in self.weights.items() if m == module for r in w.ranks}))
            for module in self.modules
        }


def same_matrices(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are views of the same numbers in memory.

    Args:
      one: an array.
      other: an array.
    """
    return memory_of(one) == memory_of(other)


def memory_of(values: np.ndarray) -> tuple[Any, ...]:
    """What tells an array from every other one that is alive: where its numbers lie, and how."""
    # Halves of an array whose strides are 0 begin at one place and are still two.
    which = id(values) if 0 in values.strides else None
    return values.__array_interface__["data"][0], values.shape, values.strides, values.dtype, which


def _host_array(name: str, values: Any, expected: str, of: str = "LoRA weights") -> np.ndarray:
    """numpy's view of what came: of one array always the same object, so that aliases are still seen."""
    if is_traced(values):
        raise InputError(f"{name} of {of} {TRACED}")
    if not isinstance(values, np.ndarray):
        try:
            # An array of jax keeps its view; `np.asarray` would go by its buffer and make a new one.
            values = host_array(values.__array__() if hasattr(values, "__array__") and not is_torch(values) else values)
        except (RuntimeError, TypeError, ValueError) as error:  # such as rows of different lengths
            found = type(values).__name__
            raise InputError(f"{name} of {of} is of type {found}, which numpy cannot read; give an array.") from error
    floating, whole = "float" in values.dtype.name, values.dtype.kind in "iu"
    if not {"floating point": floating, "integers": whole, "real numbers": floating or whole}[expected]:
        raise InputError(f"{name} of {of} has dtype {values.dtype}; expected {expected}.")
    return values


def uniform(a: np.ndarray, b: np.ndarray, scale: float, num_experts: int) -> LoRAWeights:
    """`LoRAWeights` whose experts all have one rank and one scale.

    Args:
      a: `[E or 1, R, in]`, floating point.
      b: `[E or 1, out, R]`, floating point.
      scale: the factor on the update.
      num_experts: E.

    Raises:
      InputError: as `LoRAWeights`, or an A without three axes.
    """
    a = _host_array("a", a, "floating point")
    if a.ndim != 3:
        raise InputError(f"a of LoRA weights has shape {list(a.shape)}; expected [E or 1, R, in].")
    return LoRAWeights(
        a=a,
        b=b,
        ranks=np.full(num_experts, a.shape[1], np.int32),
        scale=np.full(num_experts, scale, np.float32),
    )
