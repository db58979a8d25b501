"""What every block of one step reads beside its weights.

Letters: B requests, T tokens of a request, N rows of the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.adapters.replacements import Replacements
from jax_moe_lora.layer.linear import DensePlan, Projection, lora_linear, lora_linears
from jax_moe_lora.models.blocks.partial_sums import added_once
from jax_moe_lora.models.params import LayerParams
from pallas_kernels.ops import Implementation, LayerPages
from pallas_kernels.pytrees import pytree


@runtime_checkable
class Bank(Protocol):
    """What a decoder reads its adapters from: an `AdapterBank`, or what training makes of its parameters."""

    @property
    def num_slots(self) -> int: ...

    @property
    def replacements(self) -> Replacements | None: ...

    def layer(self, layer: int) -> LayerPages: ...


@pytree
@dataclass(frozen=True)
class StepContext:
    """What every layer of one step needs beside its weights.

    Attributes:
      positions: int32 `[B, T]`, the place of each token in its request; M or more for one that is not stored.
      starts: int32 `[B]`, the tokens of each request in the cache before this step.
      row_mask: bool `[B, T]`, False for padding, which is on the right.
      slots: int32 `[B * T]`, adapter slot of each token.
      plan: of the slots, for the dense projections.
      segments: int32 `[B, T]`, the example of each token where a row packs several; None where it holds one.
      kind: static. A `prompt` attends to itself. A `token` attends to the cache, whose next position it takes. A
        `chunk` of tokens attends to the cache and to itself.
      implementation: static. A backend by name, or None for the best.
      keep_routing: static. Return what the routers decided.
      remat: static. As in `moe_lora`.
    """

    positions: Int[Array, "B T"]
    starts: Int[Array, "B"]
    row_mask: Bool[Array, "B T"]
    slots: Int[Array, "N"]
    plan: DensePlan | None
    segments: Int[Array, "B T"] | None
    kind: Literal["prompt", "token", "chunk"] = field(metadata={"static": True})
    implementation: Implementation | None = field(metadata={"static": True})
    keep_routing: bool = field(default=False, metadata={"static": True})
    remat: bool = field(default=False, metadata={"static": True})

    @property
    def lengths(self) -> Int[Array, "B"]:
        """int32 `[B]`, the real tokens of each request in this step."""
        return self.row_mask.sum(axis=1, dtype=self.starts.dtype)


@pytree
@dataclass(frozen=True)
class Routing:
    """What a layer's router decided for N tokens.

    Attributes:
      scores: float32 `[N, E]`, its scores before any softmax, adapters included.
      experts: int32 `[N, K]`, the chosen experts, by falling weight; undefined for padding.
      weights: float32 `[N, K]`, theirs.
    """

    scores: Float[Array, "N E"]
    experts: Int[Array, "N K"]
    weights: Float[Array, "N K"]


def linear(
    module: str, weights: LayerParams, adapters: LayerPages, x: Float[Array, "B T in"], step: StepContext
) -> Float[Array, "B T out"]:
    """A projection with its bias, where it has one, and each row's adapter; in x's dtype.

    Args:
      module: its name.
      weights: the layer's arrays.
      adapters: the layer's pages.
      x: rows.
      step: what every layer reads.
    """
    weight, pages = weights[module], adapters.get(module)
    bias = added_once(weights.get(f"{module}_bias"), weight)
    rows = lora_linear(x.reshape(-1, x.shape[-1]), weight, bias, pages, step.plan, step.implementation)
    return rows.reshape(*x.shape[:-1], -1).astype(x.dtype)


def linears(
    modules: Sequence[str], weights: LayerParams, adapters: LayerPages, x: Float[Array, "B T in"], step: StepContext
) -> tuple[Float[Array, "B T _"], ...]:
    """`linear` of several projections of the same rows; of few rows in fewer kernels.

    Args:
      modules: their names.
      weights: the layer's arrays.
      adapters: the layer's pages.
      x: rows.
      step: what every layer reads.
    """
    results = float32_linears(modules, weights, adapters, x, step)
    return tuple(rows.reshape(*x.shape[:-1], -1).astype(x.dtype) for rows in results)


def float32_linears(
    modules: Sequence[str], weights: LayerParams, adapters: LayerPages, x: Float[Array, "B T in"], step: StepContext
) -> tuple[Float[Array, "N _"], ...]:
    """`linears` before they are rounded, for a kernel that does so itself.

    Args: as in `linears`.
    """
    projections = [
        Projection(weights[module], added_once(weights.get(f"{module}_bias"), weights[module]), adapters.get(module))
        for module in modules
    ]
    return lora_linears(x.reshape(-1, x.shape[-1]), projections, step.plan, step.implementation)
