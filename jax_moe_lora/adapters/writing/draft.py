"""An adapter on its way into a file: its parts, and what is refused, copied or rescaled on the way to them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from jax_moe_lora.adapters.formats.names import OUTER_PATHS, TEXT, AdapterNames, with_prefix
from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, Site, same_matrices
from jax_moe_lora.errors import AdapterFormatError


@dataclass(frozen=True)
class Part:
    """One A and one B as they stand in a file.

    Attributes:
      layer: the L of its keys.
      module: what errors call it.
      path: of its keys, below `model.layers.L.`.
      target: what the config calls it, below `model.layers.L.` too.
      parameter: whether the target is a parameter, not a module.
      a: its A.
      b: its B.
      rank: its rank.
      scale: the factor on its update.
      prefix: what the names of the text model's modules begin with.
    """

    layer: int
    module: str
    path: str
    target: str
    parameter: bool
    a: np.ndarray
    b: np.ndarray
    rank: int
    scale: float
    prefix: str = TEXT

    @property
    def full_target(self) -> str:
        return full_name(self.module, self.layer, self.target, self.prefix)

    def key(self, side: Literal["A", "B"]) -> str:
        """The key of A or B in the file; PEFT looks an embedding's A up, and names its sides otherwise."""
        lora = f"lora_embedding_{side}" if self.module == "embedding" else f"lora_{side}.weight"
        return f"base_model.model.{full_name(self.module, self.layer, self.path, self.prefix)}.{lora}"

    @property
    def patterns(self) -> tuple[str, str, str]:
        """Regular expressions for this target: in all layers and experts, in all experts of its layer, and alone."""
        everywhere = re.sub(r"\\\.\d+\\\.", lambda _: r"\.\d+\.", re.escape(self.target))
        return everywhere, rf"{re.escape(self.prefix)}layers\.{self.layer}\.{everywhere}", re.escape(self.full_target)


@dataclass(frozen=True)
class Even:
    """One module of one layer whose experts have one rank and one scale.

    Attributes:
      layer: the layer.
      module: the module.
      a: `[E or 1, R, in]`.
      b: `[E or 1, out, R]`.
      scale: the factor on every expert's update.
    """

    layer: int
    module: str
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclass
class Draft:
    """What the writers of all layouts share.

    Attributes:
      adapter: what is written.
      sites: the model's projections.
      names: where they stand in adapter files.
      layout: what users call it.
      expand: write copies of a matrix where the layout cannot share it.
      fold_scale: multiply B by the part of a scale that the config cannot say.
      notes: what differs from the adapter, for the user.
    """

    adapter: LoRAAdapter
    sites: Mapping[str, Site]
    names: AdapterNames
    layout: str
    expand: bool
    fold_scale: bool
    notes: list[str] = field(default_factory=list)

    def note(self, sentence: str) -> None:
        """Each sentence once, though it may hold in every layer."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def weights(self) -> Iterator[tuple[int, str, LoRAWeights]]:
        """(layer, module, weights) of everything that is not a zero update."""
        for layer, module in sorted(self.adapter.weights):
            weights = self.adapter.weights[layer, module]
            if weights.max_rank:
                yield layer, module, weights

    def error(self, layer: int, module: str, problem: str) -> AdapterFormatError:
        return AdapterFormatError(
            f"Adapter {self.adapter.name!r} cannot be written as {self.layout}: layer {layer}, {module}: {problem}."
        )

    def even(self, layer: int, module: str) -> Even | None:
        """The module of a layer, all experts with one rank and scale; None where the adapter has nothing for it.

        Args:
          layer: the layer.
          module: the module.

        Raises:
          AdapterFormatError: ranks differ, or scales that may not be folded into B.
        """
        weights = self.adapter.weights.get((layer, module))
        if weights is None or not weights.max_rank:
            return None
        ranks = np.unique(weights.ranks).tolist()
        if len(ranks) > 1:
            missing = "some experts are missing" if ranks[0] == 0 else f"its experts have ranks {ranks}"
            raise self.error(layer, module, f"{missing}, and this layout has one rank for all of them")
        (rank,) = ranks
        scale = float(max(weights.scale, key=abs))  # not zero, where another is not
        even = Even(layer, module, weights.a[:, :rank], weights.b[:, :, :rank], scale)
        if (weights.scale == weights.scale[0]).all():
            return even
        factors = (weights.scale.astype(np.float64) / scale)[:, None, None]
        return replace(even, b=self.folded(layer, module, self.copies(even, "b").b, scale, factors))

    def folded(self, layer: int, module: str, b: np.ndarray, scale: float, factor: np.ndarray | float) -> np.ndarray:
        """B times `factor`, since the config says `scale` where the adapter has `scale * factor`.

        Args:
          layer: for errors.
          module: for errors.
          b: `[E or 1, out, R]`.
          scale: what the config says.
          factor: the rest, one for all experts or `[E, 1, 1]`.
        """
        if not self.fold_scale:
            wanted = ", ".join(f"{value:g}" for value in np.unique(scale * np.asarray(factor)))
            problem = (
                f"its scale is {wanted} and the config has room for {scale:g}; fold_scale multiplies B by the rest"
            )
            raise self.error(layer, module, f"{problem} (--fold-scale)")
        with np.errstate(over="ignore", invalid="ignore"):
            folded = (b.astype(np.float64) * factor).astype(b.dtype)
        if not np.isfinite(folded.astype(np.float32)).all():
            raise self.error(layer, module, f"B times its scale is not finite in {b.dtype}")
        self.note(f"B of {module} was multiplied by what the config cannot say of its scale, and rounded to {b.dtype}.")
        return folded

    def copies(self, even: Even, sides: Iterable[str] = "ab") -> Even:
        """The module with one matrix per expert on some sides.

        Args:
          even: the module.
          sides: which sides, of `a` and `b`.
        """
        count = self.sites[even.module].num_experts
        for side in sides:
            matrices = getattr(even, side)
            if len(matrices) < count:
                self._allow_copies(even.layer, even.module, f"{side.upper()} is one matrix for all experts")
                self.note(f"{side.upper()} of {even.module}, which all experts share, was written {count} times.")
                copied = np.broadcast_to(matrices, (count, *matrices.shape[1:]))
                even = replace(even, a=copied) if side == "a" else replace(even, b=copied)
        return even

    def separate(self) -> None:
        """Gate and up of a layer may hold one A; this layout has two."""
        for layer, module, weights in self.weights():
            up = self.adapter.weights.get((layer, "up"))
            if module == "gate" and up is not None and same_matrices(up.a, weights.a):
                self._allow_copies(layer, module, "gate and up hold one A")
                self.note("A of gate and up, which is one matrix, was written twice.")

    def _allow_copies(self, layer: int, module: str, shared: str) -> None:
        if not self.expand:
            raise self.error(layer, module, f"{shared}, which this layout cannot say; expand writes copies (--expand)")


def full_name(module: str, layer: int, path: str, prefix: str) -> str:
    """The full name of a path: below its layer, or as it is for a module that stands outside of the layers.

    Args:
      module: the module.
      layer: the layer.
      path: below the layer, or outside of it.
      prefix: what the names of the text model's modules begin with.
    """
    return with_prefix(path if module in OUTER_PATHS.values() else f"{TEXT}layers.{layer}.{path}", prefix)


def dense_part(layer: int, module: str, weights: LoRAWeights, path: str, parameter: bool = False) -> Part:
    """A projection with one matrix, as every layout has it: A `[R, in]`, B `[out, R]`.

    Args:
      layer: the layer.
      module: the module.
      weights: of one expert.
      path: of its keys, below `model.layers.L.`.
      parameter: whether the config targets its parameter, not the module.
    """
    rank, target = int(weights.ranks[0]), f"{path}.weight" if parameter else path
    a, b = weights.a[0, :rank], weights.b[0, :, :rank]
    return Part(layer, module, path, target, parameter, a, b, rank, float(weights.scale[0]))
