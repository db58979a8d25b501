"""Quantised matrices of all experts in one tensor, with their scales in another.

gpt-oss has `<experts>.gate_up_proj_blocks` and `_scales`. transformers 5 keeps fp8 experts as `<experts>.gate_up_proj`
and `<experts>.gate_up_proj_scale_inv`, `[E, rows of blocks, columns of blocks]` (its `FP8Experts`), and writes them so
with `save_original_format=False`. Mistral 4 and Qwen3-VL-MoE are published in this form, the latter as `[E, in, out]`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.models.checkpoint_tensors import Part, Stack, stacked_parts, stacks_of
from jax_moe_lora.models.quantised.forms import FORMS, FileTensor, Form, Matrix, Shape
from jax_moe_lora.models.quantised.settings import Quantisation
from jax_moe_lora.models.quantised.stored import StoredMatrix, check_tensor, missing_tensor, no_format, refuse_ignored
from jax_moe_lora.models.specs.model import ModelConfig


@dataclass(frozen=True)
class _Stacked:
    """The tensors of one stack.

    Attributes:
      form: of the tensors.
      names: each tensor of the form by its name in the file.
      parts: a matrix's own name -> where its values stand.
      matrix: one of its matrices.
      experts: E.
    """

    form: Form
    names: Mapping[FileTensor, str]
    parts: Mapping[str, Part]
    matrix: Matrix
    experts: int


def stacked_matrices(
    config: ModelConfig, settings: Quantisation, written: Mapping[str, str], files: Mapping[str, TensorFile]
) -> Iterator[tuple[str, StoredMatrix]]:
    """The quantised matrices of a checkpoint that stand in stacks.

    Args:
      config: the model.
      settings: how its checkpoint is quantised.
      written: the checkpoint's tensors, by the names that they have in one of the text model alone.
      files: tensor -> its file.

    Yields:
      A matrix's name in 16 bits, and where it stands.

    Raises:
      CheckpointError: a tensor that is missing, has another shape or dtype, or blocks that two matrices share, by name.
    """
    for form in (form for name, form in FORMS.items() if name in settings.forms and form.stacked):
        first, places = form.tensors[0].suffix, _places(form, config, written, files)
        _refuse_incomplete(form, config, written, files)
        for stack in stacks_of(config, written, first):
            stem = stack.tensor.removesuffix(first)
            names = {tensor: stem + tensor.suffix for tensor in form.tensors}
            refuse_ignored(settings, form, stack.tensor, files[stack.tensor].path)
            values = next(name for tensor, name in names.items() if tensor.part == "values")
            parts = {
                member: places.get(member) or Part(values, place.expert, place.first_row, step=place.step)
                for member, place in stack.members.items()
            }
            yield from _members(_stacked(form, settings, names, parts, stack, files), files)


def _refuse_incomplete(
    form: Form, config: ModelConfig, written: Mapping[str, str], files: Mapping[str, TensorFile]
) -> None:
    """Refuses a stack that lacks a tensor of its form."""
    for suffix in (tensor.suffix for tensor in form.tensors if tensor.suffix):  # without one it is in 16 bits
        for stack in stacks_of(config, written, suffix):
            stem = stack.tensor.removesuffix(suffix)
            for name in (stem + tensor.suffix for tensor in form.tensors):
                if name not in files:
                    raise missing_tensor(files[stack.tensor], stack.tensor, name)


def _places(
    form: Form, config: ModelConfig, written: Mapping[str, str], files: Mapping[str, TensorFile]
) -> Mapping[str, Part]:
    """Where values stand that have a byte each: they may be stored as `[E, in, out]`, as in 16 bits."""
    if not any(tensor.part == "values" and not tensor.suffix for tensor in form.tensors):
        return {}
    return stacked_parts(stacks_of(config, written), files)


def _stacked(
    form: Form,
    settings: Quantisation,
    names: Mapping[FileTensor, str],
    parts: Mapping[str, Part],
    stack: Stack,
    files: Mapping[str, TensorFile],
) -> _Stacked:
    """The stack with the format of its matrices, which its tensors' shapes and dtypes fit."""
    experts, rows, columns = stack.shape
    joined = len(parts) // experts
    height, scales = rows // joined, names[form.scales]
    file, shape = files[scales], files[scales].infos[scales].shape
    format = form.format(settings, height, columns, _of_one(shape, experts, joined))
    if format is None:
        raise no_format(scales, file, settings, height, columns)
    matrix = Matrix(height, columns, format)
    one = next(iter(parts.values()))
    if why := _why_not(format.block, matrix, one, joined, shape):
        raise CheckpointError(f"{scales} in {file.path} has {why}; save one tensor per expert.")
    for tensor, name in names.items():
        shapes = _shapes(tensor, matrix, experts, joined)
        if one.transposed:
            shapes = [(*each[:-2], *each[:-3:-1]) if len(each) > 2 else each for each in shapes]
        check_tensor(tensor, name, files[name], shapes, matrix)
    return _Stacked(form, names, parts, matrix, experts)


def _of_one(shape: Shape, experts: int, joined: int) -> Shape:
    """The scales' shape for one matrix of a stack; empty where it has one scale."""
    if shape in _of_whole_matrices(experts, joined):
        return ()
    *_, rows, columns = (0, 0, *shape)
    return (rows // joined, columns)


def _of_whole_matrices(experts: int, joined: int) -> list[Shape]:
    """Shapes of one scale for each matrix, for each expert, or for all."""
    return [(experts, joined, 1), (experts, 1, 1), (experts,), (1,), ()]


def _shapes(tensor: FileTensor, matrix: Matrix, experts: int, joined: int) -> list[Shape]:
    """Those that a tensor may have: of matrices one after the other, and with an axis of blocks."""
    if tensor.part == "scales" and matrix.scales == (1, 1) and 0 in matrix.format.block:
        return _of_whole_matrices(experts, joined)
    (rows, columns), *_ = (shape for shape in tensor.shapes(matrix) if len(shape) == 2)
    whole = (experts, joined * rows, columns)
    groups = matrix.scales[1]
    return [whole, (*whole[:2], groups, columns // groups)] if matrix.format.per_byte == 2 else [whole]


def _why_not(block: tuple[int, int], matrix: Matrix, part: Part, joined: int, scales: Shape) -> str:
    """What of the blocks is not those of one matrix each; empty where they are."""
    height, width = block
    if part.transposed and height != width:
        return f"blocks of {height} x {width}, and its matrices are stored as [in, out]"
    if joined > 1 and part.step > 1 and (height > 1 or (height == 0 and scales[1:2] == (joined,))):
        return "scales of several rows, and rows of gate and up by turns"
    if joined > 1 and height > 1 and matrix.rows % height and joined * matrix.rows > height:
        return f"blocks of {height} rows, which cut through gate and up of {matrix.rows} rows each"
    return ""


def _members(stacked: _Stacked, files: Mapping[str, TensorFile]) -> Iterator[tuple[str, StoredMatrix]]:
    """Each matrix of a stack, by its own name."""
    scales = stacked.names[stacked.form.scales]
    shape = files[scales].infos[scales].shape
    for name, part in stacked.parts.items():
        parts: Sequence[tuple[FileTensor, Part]] = [
            (tensor, _scales_part(stacked, replace(part, tensor=scales), shape) if tensor.part == "scales" else part)
            for tensor in stacked.names
        ]
        yield name, StoredMatrix(stacked.form, stacked.matrix, tuple(parts))


def _scales_part(stacked: _Stacked, part: Part, shape: Shape) -> Part:
    """Where the scales of a matrix stand, whose values stand at `part`."""
    height = stacked.matrix.format.block[0]
    if height == 1:
        return part
    nth = part.first_row // stacked.matrix.rows if part.step == 1 else 0
    if height:
        return replace(part, first_row=nth * stacked.matrix.scales[0])
    if len(shape) < 3:  # one for an expert, or for all
        return Part(part.tensor, first_row=(part.expert or 0) if shape == (stacked.experts,) else 0)
    return Part(part.tensor, part.expert, nth if shape[1] > 1 else 0)
