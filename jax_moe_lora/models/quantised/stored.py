"""Where one quantised matrix stands in a checkpoint, and what its tensors may look like."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.models.checkpoint_tensors import Part
from jax_moe_lora.models.quantised.forms import FileTensor, Form, Matrix, Shape
from jax_moe_lora.models.quantised.listed import listing
from jax_moe_lora.models.quantised.settings import Quantisation


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


def check_tensor(tensor: FileTensor, name: str, file: TensorFile, shapes: Sequence[Shape], matrix: Matrix) -> None:
    """Checks one tensor of a matrix, or of a stack of them, from its header.

    Args:
      tensor: of the form.
      name: the tensor's in the file.
      file: holds it.
      shapes: those that it may have, the usual one first.
      matrix: one matrix.

    Raises:
      CheckpointError: another dtype or shape, by name.
    """
    info = file.infos[name]
    if info.dtype not in tensor.dtypes:
        raise CheckpointError(f"{name} in {file.path} has dtype {info.dtype}; expected {' or '.join(tensor.dtypes)}.")
    if info.shape not in shapes:
        raise CheckpointError(
            f"{name} in {file.path} has shape {list(info.shape)}; expected {list(shapes[0])} for a matrix "
            f"{[matrix.rows, matrix.columns]} in {matrix.format.name}."
        )


def missing_tensor(file: TensorFile, present: str, missing: str) -> CheckpointError:
    """The error of a matrix that lacks one of its tensors.

    Args:
      file: holds the tensor that is there.
      present: its name.
      missing: the other one's name.
    """
    return CheckpointError(f"{file.path} has {present}, and {missing} is missing.")


def no_format(scales: str, file: TensorFile, settings: Quantisation, rows: int, columns: int) -> CheckpointError:
    """The error of scales that no format has.

    Args:
      scales: the name of their tensor.
      file: holds it.
      settings: the config's.
      rows: of the matrix.
      columns: of the matrix.
    """
    groups = f" in groups of {settings.group}" if settings.group else ""
    return CheckpointError(
        f"{scales} in {file.path} has shape {list(file.infos[scales].shape)}, which no format of {settings.method} has "
        f"for a matrix {[rows, columns]}{groups}."
    )


def refuse_ignored(settings: Quantisation, form: Form, first: str, path: Path) -> None:
    """Refuses a quantised module that the config lists among those that are not.

    Args:
      settings: the config's.
      form: of the matrix.
      first: the form's first tensor, by its name in the file.
      path: of the file.

    Raises:
      CheckpointError: it is listed, by name.
    """
    module = first.removesuffix(form.tensors[0].suffix).removesuffix(".")
    entry = listing(module, settings.ignored)
    if entry is not None:
        said = "" if entry == module else f" ({entry!r})"
        raise CheckpointError(f"{path} has {first}, and the config says that {module} is not quantised{said}.")
