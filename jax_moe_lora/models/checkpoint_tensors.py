"""Where each matrix of a model stands in a checkpoint: in a tensor of its own, or in one that stacks all experts.

Per-expert form: `<experts>.E.gate_proj.weight`, one `[out, in]` matrix each. Fused form, which transformers 5 writes
with `save_original_format=False`: `<experts>.gate_up_proj` `[E, 2F, D]`, gate's rows first, and `<experts>.down_proj`
`[E, D, F]`. Stacks may also be one per projection (`<experts>.gate_proj` `[E, F, D]`), their names may end in
`.weight`, and they may be stored as `[E, in, out]`. Their shape says which; a square one is read as the others of its
checkpoint.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.dtypes import DTYPES
from jax_moe_lora.files.safetensors_io import TensorFile

Shape = tuple[int, ...]
# Stacked tensor -> the projections that it holds, one after the other.
_STACKS = {"gate_up_proj": ("gate", "up"), "gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)}


@dataclass(frozen=True)
class Part:
    """A matrix or vector of the model, as a part of a checkpoint's tensor.

    Attributes:
      tensor: the tensor's name.
      expert: which matrix of a stack; None where the tensor is the matrix.
      first_row: the first of the matrix's rows, where one tensor holds the rows of two projections.
      transposed: the tensor holds `[in, out]`.
    """

    tensor: str
    expert: int | None = None
    first_row: int = 0
    transposed: bool = False

    def view(self, tensor: np.ndarray, rows: int) -> np.ndarray:
        """The matrix in the tensor's own memory.

        Args:
          tensor: the whole tensor.
          rows: of the matrix.

        Returns:
          `[rows, in]`, or `[rows]`.
        """
        if self.expert is None:
            return tensor
        matrix = tensor[self.expert].T if self.transposed else tensor[self.expert]
        return matrix[self.first_row : self.first_row + rows]

    def pieces(self, file: TensorFile, target: np.ndarray, piece_bytes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Reads the matrix some rows at a time.

        Args:
          file: holds the tensor.
          target: an array of the matrix's shape.
          piece_bytes: what is read at a time, at least one row.

        Yields:
          A part of `target`, and the values for it.
        """
        info = file.infos[self.tensor]
        rows, *columns = info.shape if self.expert is None else info.shape[1:]
        width = math.prod(columns)
        start = (self.expert or 0) * rows * width
        first, count = (0, rows) if self.transposed else (self.first_row, len(target))
        step = max(1, piece_bytes // (width * DTYPES[info.dtype].itemsize))
        for begin in range(first, first + count, step):
            size = min(step, first + count - begin)
            values = file.get_values(self.tensor, start + begin * width, (size, width))
            if self.transposed:
                yield target[:, begin : begin + size], values[:, self.first_row : self.first_row + len(target)].T
            else:
                part = target[begin - first : begin - first + size]
                yield part, values.reshape(part.shape)


@dataclass(frozen=True)
class Stack:
    """One tensor of a projection, or of two, for all experts of a layer.

    Attributes:
      tensor: its name in the checkpoint.
      shape: its shape if it is stored as `[E, out, in]`.
      members: the per-expert name of each matrix -> (its expert, its first row).
    """

    tensor: str
    shape: Shape
    members: Mapping[str, tuple[int, int]]


def stacks_of(config: ModelConfig, names: AdapterNames, present: Callable[[str], bool]) -> list[Stack]:
    """The stacked tensors that a checkpoint has.

    Args:
      config: the model.
      names: the family's names.
      present: whether the checkpoint has a tensor of a name.
    """
    d, f = config.hidden_size, config.moe.expert_width
    widths = {"gate": (f, d), "up": (f, d), "down": (d, f)}
    part_of = {module: part for part, module in names.experts.items()}
    stacks = []
    for layer in (layer for layer, routed in enumerate(config.moe_layers) if routed):
        single = f"model.layers.{layer}.{names.per_expert_path or names.experts_path}"
        paths = dict.fromkeys((f"model.layers.{layer}.{names.experts_path}", single))
        for stem, modules in _STACKS.items():
            spellings = [f"{path}.{stem}{suffix}" for path in paths for suffix in ("", ".weight")]
            for tensor in filter(present, spellings):
                rows, width = widths[modules[0]]
                members = {
                    f"{single}.{expert}.{part_of[module]}.weight": (expert, index * rows)
                    for index, module in enumerate(modules)
                    for expert in range(config.moe.num_experts)
                }
                stacks.append(Stack(tensor, (config.moe.num_experts, len(modules) * rows, width), members))
    return stacks


def stacked_parts(stacks: Sequence[Stack], files: Mapping[str, TensorFile]) -> dict[str, Part]:
    """The part of each expert's matrix that stands in a stack, by its per-expert name.

    Args:
      stacks: from `stacks_of`.
      files: tensor -> its file.

    Raises:
      CheckpointError: a stack has another shape than the config says, or is square and no other stack says whether it
        is transposed.
    """
    shapes = {stack.tensor: files[stack.tensor].infos[stack.tensor].shape for stack in stacks}
    for stack in stacks:
        shape, turned = shapes[stack.tensor], _turned(stack.shape)
        if shape not in (stack.shape, turned):
            raise CheckpointError(
                f"{stack.tensor} in {files[stack.tensor].path} has shape {list(shape)}; the config expects "
                f"{list(stack.shape)}, or {list(turned)} for matrices stored as [in, out]."
            )
    square = [stack for stack in stacks if stack.shape == _turned(stack.shape)]
    ways = {shapes[stack.tensor] != stack.shape for stack in stacks if stack not in square}
    if square and len(ways) != 1:
        first = square[0].tensor
        why = "and the others disagree" if ways else "and so are all others"
        raise CheckpointError(
            f"{first} in {files[first].path} holds square matrices, {why}: whether they are stored as [out, in] or as "
            "[in, out] is not known; save one tensor per expert."
        )
    parts: dict[str, Part] = {}
    for stack in stacks:
        transposed = ways == {True} if stack in square else shapes[stack.tensor] != stack.shape
        for name, (expert, first_row) in stack.members.items():
            if name in parts:
                where = files[stack.tensor].path.parent
                raise CheckpointError(f"{stack.tensor} and {parts[name].tensor} of {where} both hold {name}.")
            parts[name] = Part(stack.tensor, expert, first_row, transposed)
    return parts


def _turned(shape: Shape) -> Shape:
    return (shape[0], shape[2], shape[1])
