"""One array of a layer: the row of the table from which everything about it follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Axis = Literal[
    "embed",
    "heads",
    "kv_heads",
    "whole_heads",
    "mlp",
    "whole_mlp",
    "expert",
    "expert_mlp",
    "router",
    "latent",
    "norm",
    "scalar",
]
"""Logical names of axes: `mesh/rules.py` says which of them a mesh splits.

`embed` is D; `heads` and `kv_heads` are all heads of a projection side by side. `whole_heads` and `whole_mlp` are
widths that are not split: a norm or another projection needs all of them. `router` has a value for each expert, of
which every device needs all.
"""
Init = Literal["normal", "ones", "zeros"]


@dataclass(frozen=True)
class Parameter:
    """One array of a layer, as it stands in the parameter tree and in checkpoints.

    From these rows follow the abstract parameters, random initialisation, the sites of adapters, the names in
    checkpoints and adapters, merging, and the logical axes.

    Attributes:
      name: its key in the layer's parameters. For a projection it is also the module's name in adapters.
      shape: a projection's is `[out, in]`, or `[E, out, in]` for the routed experts.
      paths: of its tensor below the layer. Where a tensor has two names, the first is that of the module in
        transformers 5, which PEFT uses, and the last one the name in published checkpoints. For the routed experts it
        is the part of an expert's own tensor, such as `gate_proj.weight`.
      axes: the logical name of each axis.
      init: random parameters are normal with deviation 0.02, ones or zeros.
      projection: it is a matrix that adapters may target.
      experts: its first axis is that of the routed experts, of which checkpoints may have a tensor each.
      float32: it stays float32 whatever dtype the model is loaded in.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[str, ...]
    axes: tuple[Axis, ...]
    init: Init = "normal"
    projection: bool = False
    experts: bool = False
    float32: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths of a projection's module: those of its tensor without `.weight`."""
        return tuple(path.removesuffix(".weight") for path in self.paths)


def projection(name: str, out: int, width: int, path: str, axes: tuple[Axis, Axis]) -> Parameter:
    """A projection with one matrix.

    Args:
      name: the module's.
      out: width of its output rows.
      width: of its input rows.
      path: of its module below the layer.
      axes: logical names of `[out, in]`.
    """
    return Parameter(name, (out, width), (f"{path}.weight",), axes, projection=True)


def expert_projection(name: str, experts: int, out: int, width: int, axes: tuple[Axis, Axis]) -> Parameter:
    """A projection of the routed experts.

    Args:
      name: `gate`, `up` or `down`.
      experts: E.
      out: width of its output rows.
      width: of its input rows.
      axes: logical names of `[out, in]`.
    """
    shape, path = (experts, out, width), f"{name}_proj.weight"
    return Parameter(name, shape, (path,), ("expert", *axes), projection=True, experts=True)


def bias(name: str, width: int, path: str, axis: Axis) -> Parameter:
    """A projection's bias.

    Args:
      name: its own.
      width: its length.
      path: of its module below the layer.
      axis: its logical name.
    """
    return Parameter(name, (width,), (f"{path}.bias",), (axis,), "zeros")


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis.

    Attributes:
      eps: added to the mean square, or to the variance.
      offset: the factor is `1 + weight` (Gemma, Qwen3-Next); else it is the weight.
      kind: `rms`; `layer` also subtracts the mean and has a bias (Phi-MoE).
      wide: the factor multiplies in float32, before the cast to the rows' dtype (gpt-oss, Gemma 4); with an offset it
        always does.
    """

    eps: float = 1e-6
    offset: bool = False
    kind: Literal["rms", "layer"] = "rms"
    wide: bool = False

    def parameters(self, name: str, width: int, path: str) -> Sequence[Parameter]:
        """Its weight, and its bias where it has one.

        Args:
          name: the weight's.
          width: its length.
          path: of its module below the layer.
        """
        weight = Parameter(name, (width,), (f"{path}.weight",), ("norm",), "zeros" if self.offset else "ones")
        return [weight, bias(f"{name}_bias", width, path, "norm")] if self.kind == "layer" else [weight]


RMS = Norm()
"""The norm of most families."""
