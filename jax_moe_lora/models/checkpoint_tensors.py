"""Where each matrix of a model stands in a checkpoint: in a tensor of its own, or as a part of a larger one.

Per-expert form: `<experts>.E.gate_proj.weight`, one `[out, in]` matrix each. Fused form, which transformers 5 writes
with `save_original_format=False`: `<experts>.gate_up_proj` `[E, 2F, D]`, gate's rows first, and `<experts>.down_proj`
`[E, D, F]`. Stacks may also be one per projection (`<experts>.gate_proj` `[E, F, D]`), their names may end in
`.weight`, and they may be stored as `[E, in, out]`. Their shape says which; a square one is read as the others of its
checkpoint.

Joined form, where a family names it (`Family.joined`): `[out of q + out of k + out of v, in]`, one after the other.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.dtypes import DTYPES, QUANTISED_DTYPES
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.names import experts_below, parameter_tensors, table
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.models.specs.parameter import Parameter

# A part of a row that is shorter is read with the whole row: files are cached by pages of this size anyway.
PAGE_BYTES = 4096
Shape = tuple[int, ...]
# Stacked tensor -> the projections that it holds, one after the other.
_STACKS = {"gate_up_proj": ("gate", "up"), "gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",)}


@dataclass(frozen=True)
class Part:
    """A matrix or vector of the model, as a part of a checkpoint's tensor.

    Attributes:
      tensor: the tensor's name.
      expert: which matrix of a stack; None where the tensor is no stack.
      first_row: the first of the matrix's rows, where one tensor holds the rows of several projections.
      transposed: the tensor holds `[in, out]`.
      step: from one of the matrix's rows to the next, where the rows of two projections alternate.
      first_column: the first of the columns that are read.
    """

    tensor: str
    expert: int | None = None
    first_row: int = 0
    transposed: bool = False
    step: int = 1
    first_column: int = 0

    def view(self, tensor: np.ndarray, rows: int) -> np.ndarray:
        """The matrix in the tensor's own memory.

        Args:
          tensor: the whole tensor.
          rows: of the matrix.

        Returns:
          `[rows, in]`, or `[rows]`.
        """
        matrix = tensor if self.expert is None else tensor[self.expert]
        matrix = matrix.T if self.transposed else matrix
        return matrix[self.first_row : self.first_row + rows * self.step : self.step]

    def at(self, row: int, column: int) -> "Part":
        """The part whose first row and column these are; `pieces` reads as many as its target has.

        Args:
          row: of this part.
          column: of this part.
        """
        return replace(self, first_row=self.first_row + row * self.step, first_column=self.first_column + column)

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
        height, *others = (info.shape or (1,)) if self.expert is None else info.shape[1:]
        width = math.prod(others)
        start = (self.expert or 0) * height * width
        rows = _Run(self.first_row, len(target), self.step)
        columns = _Run(self.first_column, math.prod(target.shape[1:]))
        if self.transposed:
            rows, columns = columns, rows
        itemsize = (DTYPES | QUANTISED_DTYPES)[info.dtype].itemsize
        # What lies beside them is not read where that saves something.
        alone = 2 * columns.span <= width and columns.span * itemsize >= PAGE_BYTES
        at_once = max(1, piece_bytes // (itemsize * (columns.span if alone else width * rows.step)))
        for begin in range(0, rows.count, at_once):
            some = _Run(rows.first + begin * rows.step, min(at_once, rows.count - begin), rows.step)
            if alone:
                runs = [start + row * width + columns.first for row in some.places]
                values = np.concatenate([file.get_stored(self.tensor, run, (1, columns.span)) for run in runs])
                values = values[:, :: columns.step]
            else:
                values = file.get_stored(self.tensor, start + some.first * width, (some.span, width))
                values = values[:: some.step, columns.slice]
            yield self._filled(target, begin, values)

    def _filled(self, target: np.ndarray, first: int, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part of a target that values from rows of the file are for, and the values in its order."""
        if self.transposed:
            return target[:, first : first + len(values)], values.T
        part = target[first : first + len(values)]
        return part, values.reshape(part.shape)


@dataclass(frozen=True)
class _Run:
    """Rows or columns of a tensor.

    Attributes:
      first: the first of them.
      count: how many.
      step: from one to the next.
    """

    first: int
    count: int
    step: int = 1

    @property
    def span(self) -> int:
        """From the first to the last, both counted."""
        return max(self.count - 1, 0) * self.step + 1 if self.count else 0

    @property
    def places(self) -> range:
        return range(self.first, self.first + self.span, self.step)

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.span, self.step)


@dataclass(frozen=True)
class Member:
    """A matrix or vector of a stack.

    Attributes:
      expert: its own; None in a tensor that only joins projections.
      first_row: the first of its rows.
      step: from one of its rows to the next.
    """

    expert: int | None
    first_row: int
    step: int


@dataclass(frozen=True)
class Stack:
    """One tensor of a projection, or of two, for all experts of a layer; or one of several projections without experts.

    Attributes:
      tensor: its name in the checkpoint.
      shape: its shape if it is stored as `[E, out, in]`, or `[out, in]` without experts.
      members: the own name of each matrix -> where it stands in the stack.
    """

    tensor: str
    shape: Shape
    members: Mapping[str, Member]


def stacks_of(config: ModelConfig, written: Mapping[str, str], behind: str = "") -> list[Stack]:
    """The stacked tensors that a checkpoint has.

    Args:
      config: the model.
      written: the checkpoint's tensors, by the names that they have in one of the text model alone.
      behind: what stands behind the name that a stack has in 16 bits, such as `_blocks`.
    """
    of = family(config.model_type)
    stacks = []
    for layer in config.routed_layers:
        rows = {row.name: row for row in table(config, layer) if row.experts}
        below = f"model.layers.{layer}."
        paths = dict.fromkeys((f"{below}{of.experts_path}", experts_below(config, layer)))
        for stem, modules in _STACKS.items():
            for suffix in ("", "_bias"):
                of_modules = [rows[f"{module}{suffix}"] for module in modules if f"{module}{suffix}" in rows]
                spellings = [f"{path}.{stem}{suffix}{end}" for path in paths for end in ("", ".weight")]
                spellings += [f"{below}{path}" for path in of.stacks.get(f"{stem}{suffix}", ())]
                if of_modules:
                    present = [written[f"{name}{behind}"] for name in spellings if f"{name}{behind}" in written]
                    stacks += [_stack(config, layer, tensor, of_modules, of.interleaved) for tensor in present]
    return stacks


def joined_of(config: ModelConfig, written: Mapping[str, str]) -> list[Stack]:
    """The tensors of a checkpoint that hold the rows of several projections, one after the other.

    Args:
      config: the model.
      written: the checkpoint's tensors, by the names that they have in one of the text model alone.
    """
    stacks = []
    for path, names in family(config.model_type).joined.items():
        for layer in range(config.num_layers):
            rows = {row.name: row for row in table(config, layer)}
            tensor = written.get(f"model.layers.{layer}.{path}")
            if tensor is not None and rows.keys() >= {*names}:
                parts = [rows[name] for name in names]
                ends = [*accumulate(part.shape[0] for part in parts)]
                members = {
                    f"model.layers.{layer}.{part.paths[-1]}": Member(None, end - part.shape[0], 1)
                    for part, end in zip(parts, ends, strict=True)
                }
                stacks.append(Stack(tensor, (ends[-1], *parts[0].shape[1:]), members))
    return stacks


def _stack(config: ModelConfig, layer: int, tensor: str, rows: Sequence[Parameter], interleaved: bool) -> Stack:
    """One tensor that holds these parameters of all experts."""
    experts, height, *columns = rows[0].shape
    mixed = interleaved and len(rows) > 1
    members = {
        name: Member(expert, index if mixed else index * height, len(rows) if mixed else 1)
        for index, row in enumerate(rows)
        for expert, name in enumerate(parameter_tensors(config, layer, row))
    }
    return Stack(tensor, (experts, len(rows) * height, *columns), members)


def stacked_parts(stacks: Sequence[Stack], files: Mapping[str, TensorFile]) -> dict[str, Part]:
    """Where each matrix that is in a stack stands there, by its own name.

    Args:
      stacks: from `stacks_of` and `joined_of`.
      files: tensor -> its file.

    Raises:
      CheckpointError: a stack has another shape than the config says, or is square and no other stack says whether it
        is transposed.
    """
    shapes = {stack.tensor: files[stack.tensor].infos[stack.tensor].shape for stack in stacks}
    for stack in stacks:
        shape, turned = shapes[stack.tensor], _turned(stack.shape)
        if shape not in (stack.shape, turned):
            either = f", or {list(turned)} for matrices stored as [in, out]" if turned != stack.shape else ""
            raise CheckpointError(
                f"{stack.tensor} in {files[stack.tensor].path} has shape {list(shape)}; the config expects "
                f"{list(stack.shape)}{either}."
            )
    square = [stack for stack in stacks if len(stack.shape) == 3 and stack.shape == _turned(stack.shape)]
    ways = {shapes[stack.tensor] != stack.shape for stack in stacks if len(stack.shape) == 3 and stack not in square}
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
        for name, member in stack.members.items():
            if name in parts:
                where = files[stack.tensor].path.parent
                raise CheckpointError(f"{stack.tensor} and {parts[name].tensor} of {where} both hold {name}.")
            parts[name] = Part(stack.tensor, member.expert, member.first_row, transposed, member.step)
    return parts


def _turned(shape: Shape) -> Shape:
    """The shape of a stack of matrices that are stored as `[in, out]`; vectors have one form."""
    return (shape[0], *shape[:0:-1])
