"""Where the quantised matrices of a model stand in a checkpoint, checked from its headers alone."""

from collections.abc import Mapping, Sequence

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.models.checkpoint_tensors import Part
from jax_moe_lora.models.quantised.forms import ACTIVATIONS, FORMS, FileTensor, Form, Matrix
from jax_moe_lora.models.quantised.settings import Quantisation
from jax_moe_lora.models.quantised.stacked import stacked_matrices
from jax_moe_lora.models.quantised.stored import StoredMatrix, check_tensor, missing_tensor, no_format, refuse_ignored
from jax_moe_lora.models.specs.model import ModelConfig

Shape = tuple[int, ...]
EMBEDDING = "model.embed_tokens.weight"


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
                if form is None:
                    _refuse_incomplete(settings, stem, written, files)
                elif name not in found:
                    parts = _parts(form, stem, written, files)
                    _refuse_embedding(name, parts[0][1].tensor, files)
                    found[name] = _stored(form, settings, shape, parts, files)
    return found | dict(stacked_matrices(config, settings, written, files))


def check_experts(
    names: Sequence[str],
    quantised: Mapping[str, StoredMatrix],
    plain: Mapping[str, Part],
    files: Mapping[str, TensorFile],
) -> None:
    """Checks that all experts of a layer have one format, from headers alone.

    Args:
      names: of one projection's matrices, an expert each.
      quantised: those that are -> where they stand.
      plain: the others -> where they stand.
      files: tensor -> its file.

    Raises:
      CheckpointError: some are in 16 bits, or two have formats that differ, by name.
    """
    stored = [quantised[name] for name in names if name in quantised]
    if not stored:
        return
    first = _scales(stored[0])
    wide = next((plain[name].tensor for name in names if name in plain), None)
    if wide is not None:
        raise CheckpointError(
            f"{files[wide].path.parent} has {wide} in 16 bits and others of its layer's experts quantised ({first})."
        )
    odd = next((one for one in stored if one.matrix != stored[0].matrix), None)
    if odd is not None:
        raise CheckpointError(
            f"{_scales(odd)} in {files[_scales(odd)].path} and {first} have formats that differ, "
            f"{_said(odd)} and {_said(stored[0])}; experts of a layer need one."
        )


def _scales(stored: StoredMatrix) -> str:
    return next(part.tensor for tensor, part in stored.parts if tensor.part == "scales")


def _said(stored: StoredMatrix) -> str:
    format = stored.matrix.format
    rows, columns = (size or "all" for size in format.block)
    return f"{format.name} with a scale of {rows} rows and {columns} columns"


def activation_scales(names: Mapping[str, TensorFile]) -> dict[str, str]:
    """Tensors that quantise rows or caches, which stay in 16 bits: name -> what it is."""
    ends = (*(f".{suffix}" for suffix in ACTIVATIONS), "_proj_activation_scale")
    return {name: "a scale of activations" for name in names if name.endswith(ends)}


def _form(settings: Quantisation, stem: str, written: Mapping[str, str]) -> Form | None:
    """The form of a module's matrix, None where it is stored in 16 bits."""
    forms = (form for name, form in FORMS.items() if name in settings.forms and not form.stacked)
    return next((form for form in forms if stem + form.tensors[0].suffix in written), None)


def _refuse_incomplete(
    settings: Quantisation, stem: str, written: Mapping[str, str], files: Mapping[str, TensorFile]
) -> None:
    """Refuses a module that has some of a form's tensors, and not the first one, which no other form has."""
    incomplete = []
    for form in (form for name, form in FORMS.items() if name in settings.forms and not form.stacked):
        names = [written.get(stem + tensor.suffix) for tensor in form.tensors if tensor.suffix != "weight"]
        present = next((name for name in names if name is not None), None)
        if present is not None:
            incomplete.append((names.count(None), present, stem + form.tensors[0].suffix))
    if incomplete:  # the form of which the least is missing
        _, first, missing = min(incomplete)
        raise missing_tensor(files[first], first, missing)


def _parts(
    form: Form, stem: str, written: Mapping[str, str], files: Mapping[str, TensorFile]
) -> list[tuple[FileTensor, Part]]:
    names = {tensor: written.get(stem + tensor.suffix) for tensor in form.tensors}
    first = next(name for name in names.values() if name is not None)
    for tensor, name in names.items():
        if name is None and not tensor.optional:
            raise missing_tensor(files[first], first, stem + tensor.suffix)
    return [(tensor, Part(name)) for tensor, name in names.items() if name is not None]


def _refuse_embedding(name: str, tensor: str, files: Mapping[str, TensorFile]) -> None:
    """Rows of an embedding are looked up, not multiplied."""
    if name == EMBEDDING:
        raise CheckpointError(f"{files[tensor].path} has {tensor}: an embedding is read in 16 bits, not quantised.")


def _stored(
    form: Form,
    settings: Quantisation,
    shape: Shape,
    parts: list[tuple[FileTensor, Part]],
    files: Mapping[str, TensorFile],
) -> StoredMatrix:
    """The matrix with its format, which its tensors' shapes and dtypes fit."""
    rows, columns = shape
    of_scales = next(part for tensor, part in parts if tensor is form.scales).tensor
    scales, path = files[of_scales].infos[of_scales].shape, files[of_scales].path
    refuse_ignored(settings, form, parts[0][1].tensor, path)
    format = form.format(settings, rows, columns, scales)
    if format is None:
        raise no_format(of_scales, files[of_scales], settings, rows, columns)
    matrix = Matrix(rows, columns, format)
    for tensor, part in parts:
        check_tensor(tensor, part.tensor, files[part.tensor], tensor.shapes(matrix), matrix)
    return StoredMatrix(form, matrix, tuple(parts))
