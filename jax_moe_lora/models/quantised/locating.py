"""Where the quantised matrices of a model stand in a checkpoint, checked from its headers alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.models.checkpoint_tensors import Part, stacks_of
from jax_moe_lora.models.quantised.forms import ACTIVATIONS, FORMS, FileTensor, Form, Matrix
from jax_moe_lora.models.quantised.settings import Quantisation
from jax_moe_lora.models.specs.model import ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredMatrix:
    """Where one matrix stands.

    Attributes:
      form: of its tensors.
      matrix: its sizes, and the format that it is read as.
      parts: each tensor of the form that is there, and the matrix's part of it.
    """

    form: Form
    matrix: Matrix
    parts: tuple[tuple[FileTensor, Part], ...]


def quantised_matrices(
    config: ModelConfig,
    written: Mapping[str, str],
    files: Mapping[str, TensorFile],
    expected: Mapping[str, Shape],
    aliases: Mapping[str, str],
) -> dict[str, StoredMatrix]:
    """The matrices that a checkpoint holds in a quantised form.

    Args:
      config: the model.
      written: the checkpoint's tensors, by the names that they have in one of the text model alone.
      files: tensor -> its file.
      expected: the model's tensors in 16 bits, by their names -> their shapes.
      aliases: names of these -> second names.

    Returns:
      Name in 16 bits -> where it stands; empty for a checkpoint that is not quantised.

    Raises:
      CheckpointError: a tensor that is missing, has another shape or dtype, or is of a module that the config says is
        not quantised, by name.
    """
    settings = config.quantisation
    if settings is None:
        return {}
    found = {}
    for name, shape in expected.items():
        if len(shape) == 2 and name.endswith(".weight"):
            for spelling in dict.fromkeys((name, aliases.get(name, name))):
                stem = spelling.removesuffix("weight")
                form = _form(settings, stem, written)
                if form is not None and name not in found:
                    parts = _parts(form, stem, written, files)
                    found[name] = _stored(form, settings, shape, parts, files)
    return found | dict(_stacked(config, settings, written, files))


def activation_scales(names: Mapping[str, TensorFile]) -> dict[str, str]:
    """Tensors that quantise rows or caches, which stay in 16 bits: name -> what it is."""
    ends = tuple(f".{suffix}" for suffix in ACTIVATIONS)
    return {name: "a scale of activations" for name in names if name.endswith(ends)}


def _form(settings: Quantisation, stem: str, written: Mapping[str, str]) -> Form | None:
    """The form of a module's matrix, None where it is stored in 16 bits."""
    forms = (form for name, form in FORMS.items() if name in settings.forms and not form.stacked)
    return next((form for form in forms if stem + form.tensors[0].suffix in written), None)


def _parts(
    form: Form, stem: str, written: Mapping[str, str], files: Mapping[str, TensorFile]
) -> list[tuple[FileTensor, Part]]:
    names = {tensor: written.get(stem + tensor.suffix) for tensor in form.tensors}
    first = next(name for name in names.values() if name is not None)
    for tensor, name in names.items():
        if name is None and not tensor.optional:
            raise CheckpointError(f"{files[first].path} has {first}, and {stem}{tensor.suffix} is missing.")
    return [(tensor, Part(name)) for tensor, name in names.items() if name is not None]


def _stacked(
    config: ModelConfig, settings: Quantisation, written: Mapping[str, str], files: Mapping[str, TensorFile]
) -> Iterator[tuple[str, StoredMatrix]]:
    """Matrices of all experts in one tensor."""
    for form in (form for name, form in FORMS.items() if name in settings.forms and form.stacked):
        first = form.tensors[0].suffix
        for stack in stacks_of(config, written, (first,)):
            stem = stack.tensor.removesuffix(first)
            tensors = [(tensor, stem + tensor.suffix) for tensor in form.tensors]
            for _, name in tensors:
                if name not in files:
                    raise CheckpointError(f"{files[stack.tensor].path} has {stack.tensor}, and {name} is missing.")
            experts, rows, columns = stack.shape
            parts = [(tensor, Part(name)) for tensor, name in tensors]
            whole = _stored(form, settings, (rows, columns), parts, files, experts)
            height = rows // (len(stack.members) // experts)
            matrix = Matrix(height, columns, whole.matrix.format)
            for member, place in stack.members.items():
                own = tuple(
                    (tensor, Part(name, place.expert, place.first_row, step=place.step)) for tensor, name in tensors
                )
                yield member, StoredMatrix(form, matrix, own)


def _stored(
    form: Form,
    settings: Quantisation,
    shape: Shape,
    parts: list[tuple[FileTensor, Part]],
    files: Mapping[str, TensorFile],
    experts: int | None = None,
) -> StoredMatrix:
    """The matrix with its format, which its tensors' shapes and dtypes fit."""
    rows, columns = shape
    of_scales = next(part for tensor, part in parts if tensor is form.scales).tensor
    scales, path = files[of_scales].infos[of_scales].shape, files[of_scales].path
    _refuse_ignored(settings, form, parts, path)
    format = form.format(settings, rows, columns, scales)
    if format is None:
        raise CheckpointError(
            f"{of_scales} in {path} has shape {list(scales)}, which no format of {settings.method} has for a matrix "
            f"{[rows, columns]}."
        )
    matrix = Matrix(rows, columns, format)
    for tensor, part in parts:
        info, where = files[part.tensor].infos[part.tensor], files[part.tensor].path
        shapes = tensor.shapes(matrix)
        if experts is not None:  # blocks may have an axis of their own
            wide = [(experts, *one) for one in shapes]
            shapes = (*wide, *((*one[:-1], matrix.scales[1], one[-1] // matrix.scales[1]) for one in wide))
        if info.dtype not in tensor.dtypes:
            wanted = " or ".join(tensor.dtypes)
            raise CheckpointError(f"{part.tensor} in {where} has dtype {info.dtype}; expected {wanted}.")
        if info.shape not in shapes:
            raise CheckpointError(
                f"{part.tensor} in {where} has shape {list(info.shape)}; expected {list(shapes[0])} for a matrix "
                f"{[rows, columns]} in {format.name}."
            )
    return StoredMatrix(form, matrix, tuple(parts))


def _refuse_ignored(settings: Quantisation, form: Form, parts: list[tuple[FileTensor, Part]], path: Path) -> None:
    first = parts[0][1].tensor
    module = first.removesuffix(form.tensors[0].suffix).removesuffix(".")
    if module in settings.ignored:
        raise CheckpointError(f"{path} has {first}, and the config says that {module} is not quantised.")
