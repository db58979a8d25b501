"""Quantised matrices, each dequantised, updated and quantised again in the form that it has."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.dtypes import WRITTEN
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.files.safetensors_writer import Planned
from jax_moe_lora.models.loading import PIECE_BYTES
from jax_moe_lora.models.quantised.forms import FileTensor
from jax_moe_lora.models.quantised.quantising import empty, quantise_into
from jax_moe_lora.models.quantised.reading import read_quantised
from jax_moe_lora.models.quantised.stored import StoredMatrix
from jax_moe_lora.models.quantised.values import too_large
from jax_moe_lora.models.quantised.writing import file_array, planned_tensors, writable
from jax_moe_lora.tools.checkpoint_writing import Group
from pallas_kernels.quantised.api import dequantise
from pallas_kernels.quantised.array import Quantised


@dataclass(frozen=True)
class Change:
    """What is added to one quantised matrix.

    Attributes:
      name: of the matrix in 16 bits.
      module: which it is of.
      stored: where it stands.
      delta: makes the update, float32 `[out, in]`.
    """

    name: str
    module: str
    stored: StoredMatrix
    delta: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Requantised:
    """What quantising again changed, of all matrices of a module. Norms are Frobenius norms over all of them.

    Attributes:
      module: its name.
      matrices: how many were changed.
      error: `|Q - S| / |S|`, for the sums S and what is stored of them, Q.
      of_update: `|Q - S| / |U|`, for the updates U; above 1 the rounding is larger than what was merged.
      kept: `<Q - W, U> / <U, U>`, for the weights W before: the share of the update that is stored; 1 for all of it.
    """

    module: str
    matrices: int
    error: float
    of_update: float
    kept: float


class Errors:
    """Sums of squares by module, added up while matrices are written."""

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, module: str, before: np.ndarray, update: np.ndarray, after: np.ndarray) -> None:
        """Counts a matrix.

        Args:
          module: which it is of.
          before: float32 `[out, in]`.
          update: of the same shape.
          after: what is stored of their sum.
        """
        wanted = before + update
        terms = ((after - wanted) ** 2, wanted**2, update**2, (after - before) * update)
        sums = np.array([1.0, *(float(term.sum(dtype=np.float64)) for term in terms)])
        self._sums[module] = self._sums.get(module, 0.0) + sums

    def report(self) -> list[Requantised]:
        """A row per module."""
        rows = []
        for module, (count, wrong, whole, update, kept) in self._sums.items():
            of_update = (wrong / update) ** 0.5 if update else 0.0
            error = (wrong / whole) ** 0.5 if whole else 0.0
            rows.append(Requantised(module, int(count), error, of_update, kept / update if update else 1.0))
        return rows


def changed_groups(changes: Sequence[Change], files: Mapping[str, TensorFile], errors: Errors) -> list[Group]:
    """The tensors of matrices that change; matrices that share tensors are one group.

    Args:
      changes: one per matrix.
      files: tensor -> its file.
      errors: is told what quantising again changed, when the groups are written.

    Raises:
      CheckpointError: a form that merged weights are not written in, by name.
    """
    together: dict[tuple[str, ...], list[Change]] = {}
    for change in changes:
        form, names = change.stored.form, [part.tensor for _, part in change.stored.parts]
        if not writable(form):
            raise CheckpointError(
                f"{change.name} in {files[names[0]].path} is stored in {change.stored.matrix.format.name} as "
                f"{names[0]}, a form that is read and not written; merge into the 16-bit checkpoint, and quantise that."
            )
        together.setdefault(tuple(names), []).append(change)
    return [
        _stack(members, files, errors) if members[0].stored.form.stacked else _single(members[0], files, errors)
        for members in together.values()
    ]


def _single(change: Change, files: Mapping[str, TensorFile], errors: Errors) -> Group:
    """A matrix with tensors of its own, whose names and shapes stay; scales of fp8 become float32."""
    stored = change.stored
    names = {tensor.suffix: part.tensor for tensor, part in stored.parts}
    infos = {suffix: files[name].infos[name] for suffix, name in names.items()}
    kind = WRITTEN[infos[stored.form.scales.suffix].dtype]
    planned: dict[FileTensor, Planned] = {
        tensor: Planned(plan.dtype, infos[tensor.suffix].shape)
        for tensor, plan in planned_tensors(stored.form, stored.matrix, kind).items()
    }

    def make() -> Iterator[tuple[str, np.ndarray]]:
        before = read_quantised([stored], files, np.dtype(np.float32), False, np.empty, PIECE_BYTES)
        after = _changed(change, before, kind, files, errors)
        for tensor, plan in planned.items():
            yield names[tensor.suffix], file_array(tensor, plan, after)

    return Group({names[tensor.suffix]: plan for tensor, plan in planned.items()}, make)


def _stack(members: Sequence[Change], files: Mapping[str, TensorFile], errors: Errors) -> Group:
    """Matrices that stand in one stack; those that do not change keep their bits."""
    names = [(tensor, part.tensor) for tensor, part in members[0].stored.parts]
    infos = {name: files[name].infos[name] for _, name in names}
    planned = {name: Planned(WRITTEN[info.dtype], info.shape) for name, info in infos.items()}

    def make() -> Iterator[tuple[str, np.ndarray]]:
        whole = {tensor.part: files[name].get_stored(name, 0, infos[name].shape) for tensor, name in names}
        flat = {part: array.reshape(*array.shape[:2], -1) for part, array in whole.items()}
        for member in members:
            part, rows = member.stored.parts[0][1], member.stored.matrix.rows
            place = (part.expert, slice(part.first_row, part.first_row + rows * part.step, part.step))
            before = read_quantised([member.stored], files, np.dtype(np.float32), False, np.empty, PIECE_BYTES)
            after = _changed(member, before, np.dtype(np.uint8), files, errors)
            for role, array in flat.items():
                array[place] = getattr(after, role)
        for tensor, name in names:
            yield name, whole[tensor.part]

    return Group(planned, make)


def _changed(
    change: Change, before: Quantised, scales_dtype: np.dtype, files: Mapping[str, TensorFile], errors: Errors
) -> Quantised:
    """The matrix with its update, quantised again."""
    numbers = np.asarray(dequantise(jax.tree.map(jnp.asarray, before), jnp.float32))
    update = change.delta()
    after = empty(before.shape, before.format, scales_dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = numbers + update
    finite = bool(np.isfinite(wanted).all())
    if finite:
        quantise_into(after, wanted, PIECE_BYTES)
    if not finite or too_large(after.format.codec, {"scales": np.asarray(after.scales)}, wanted.dtype):
        where = files[change.stored.parts[0][1].tensor].path.parent
        raise CheckpointError(f"{change.name} of {where} with the adapter is not finite in {after.format.name}.")
    errors.add(change.module, numbers, update, np.asarray(dequantise(jax.tree.map(jnp.asarray, after), jnp.float32)))
    return after
