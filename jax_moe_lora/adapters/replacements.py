"""Whole matrices in place of the model's embedding or head: what PEFT saves of them with `modules_to_save`.

Such a matrix is no update of low rank, so it has no pages. A bank that is made with room for C of them holds C arrays
`[V, D]`, each of which serves either module, and for each module a table of the matrix that each slot uses.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.lora import REPLACEABLE, memory_of
from jax_moe_lora.adapters.updates import matrix_chunk_rows, scatter
from jax_moe_lora.errors import BankFullError
from jax_moe_lora.files.sizes import format_bytes
from pallas_kernels.pytrees import pytree

FREE = -1
BASE = -1
"""In the tables: the slot uses the model's own matrix."""


@pytree
@dataclass(frozen=True)
class Replacements:
    """The whole matrices of a bank.

    Attributes:
      matrices: C arrays `[V, D]`.
      owners: int32 `[C]`, the slot that holds each of them, or `FREE`.
      tables: `embedding` and `head` -> int32 `[S]`, the matrix of each slot, or `BASE`.
    """

    matrices: tuple[Float[Array, "_V _D"], ...]
    owners: Int[Array, "C"]
    tables: dict[str, Int[Array, "S"]]

    @property
    def shape(self) -> tuple[int, int]:
        """V and D."""
        rows, width = self.matrices[0].shape
        return rows, width

    @property
    def matrix_nbytes(self) -> int:
        return self.matrices[0].nbytes

    def slot_nbytes(self, slot: int) -> int:
        """Bytes of the matrices that a slot holds."""
        return int((np.asarray(self.owners) == slot).sum()) * self.matrix_nbytes

    def of_rows(self, module: str, slots: Int[Array, "N"]) -> Int[Array, "N"]:
        """The matrix that each row uses.

        Args:
          module: `embedding` or `head`.
          slots: int32 `[N]`.

        Returns:
          int32 `[N]`, `BASE` where it is the model's own, as for a slot out of range.
        """
        table = self.tables[module]
        known = (slots >= 0) & (slots < table.shape[0])
        return jnp.where(known, table[jnp.where(known, slots, 0)], BASE)

    def place(self, name: str, slot: int, replaced: Mapping[str, np.ndarray]) -> "tuple[Replacements, dict[str, int]]":
        """The same with free matrices marked as the slot's; two modules that hold one array share one.

        Args:
          name: the adapter's.
          slot: the slot.
          replaced: module -> `[V, D]`.

        Returns:
          The new owners, and module -> the matrix that it gets.

        Raises:
          BankFullError: too few are free.
        """
        owners = np.array(self.owners)
        free, needed = np.flatnonzero(owners == FREE), distinct(replaced)
        if len(needed) > len(free):
            raise BankFullError(
                f"Adapter {name!r} needs {len(needed)} whole matrices of {format_bytes(self.matrix_nbytes)} "
                f"(modules_to_save) and {len(free)} of the bank's {len(owners)} are free; unload an adapter that has "
                "some, or load the model with more max_replacements."
            )
        place_of = dict(zip(needed, map(int, free), strict=False))
        owners[list(place_of.values())] = slot
        places = {module: place_of[memory_of(matrix)] for module, matrix in replaced.items()}
        return replace(self, owners=jnp.asarray(owners)), places

    def publish(self, slot: int, places: Mapping[str, int]) -> "Replacements":
        """The same with the slot's rows of the tables set.

        Args:
          slot: the slot.
          places: module -> its matrix; the others are the model's own.
        """
        tables = {module: np.array(table) for module, table in self.tables.items()}
        for module, table in tables.items():
            table[slot] = places.get(module, BASE)
        return replace(self, tables={module: jnp.asarray(table) for module, table in tables.items()})

    def clear(self, slot: int) -> "Replacements":
        """The same with the slot's matrices free, and its rows of the tables the model's own."""
        owners = np.asarray(self.owners)
        freed = replace(self, owners=jnp.asarray(np.where(owners == slot, np.int32(FREE), owners)))
        return freed.publish(slot, {})

    def write(self, index: int, rows: Int[Array, "n"], values: Float[Array, "n _D"]) -> "Replacements":
        """The same with some rows of a matrix written, in its memory.

        Args:
          index: the matrix, which is donated.
          rows: which rows; those past the end are dropped.
          values: theirs.
        """
        matrices = list(self.matrices)
        matrices[index] = scatter(matrices[index], rows, values)
        return replace(self, matrices=tuple(matrices))

    def read(self, slot: int) -> dict[str, np.ndarray]:
        """Module -> the matrix that a slot has in place of the model's; two that share one get one array.

        Args:
          slot: the slot.
        """
        places = {module: int(np.asarray(table)[slot]) for module, table in self.tables.items()}
        arrays = {place: np.array(self.matrices[place]) for place in set(places.values()) if place != BASE}
        return {module: arrays[place] for module, place in places.items() if place != BASE}


def create_replacements(
    count: int, shape: tuple[int, int], num_slots: int, dtype: np.dtype, mesh: jax.sharding.Mesh | None = None
) -> Replacements | None:
    """Room for whole matrices; None for none. Compiles what loading runs.

    Args:
      count: C.
      shape: V and D.
      num_slots: S.
      dtype: of the matrices.
      mesh: devices that each have all matrices; None for the default one.
    """
    if not count:
        return None
    place = None if mesh is None else NamedSharding(mesh, P())
    rows = matrix_chunk_rows(shape, dtype.itemsize)
    at = partial(jax.ShapeDtypeStruct, sharding=place)
    scatter.lower(at(shape, dtype), at((rows,), jnp.int32), at((rows, shape[1]), dtype)).compile()
    return Replacements(
        tuple(jnp.zeros(shape, dtype, device=place) for _ in range(count)),
        jnp.full(count, FREE, jnp.int32),
        {module: jnp.full(num_slots, BASE, jnp.int32) for module in REPLACEABLE},
    )


def matrix_chunks(matrix: np.ndarray, dtype: np.dtype) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The rows of a matrix in chunks of one static size.

    Args:
      matrix: `[V, D]`.
      dtype: of the chunks.

    Yields:
      int32 `[n]`, the rows, past the end where the last chunk has none, and their values `[n, D]`.
    """
    count, width = matrix.shape
    size = matrix_chunk_rows((count, width), dtype.itemsize)
    for begin in range(0, count, size):
        rows, values = np.full(size, count, np.int32), np.zeros((size, width), dtype)
        taken = min(size, count - begin)
        rows[:taken] = np.arange(begin, begin + taken)
        values[:taken] = matrix[begin : begin + taken]
        yield rows, values


def distinct(replaced: Mapping[str, np.ndarray]) -> list[object]:
    """What identifies each of the different arrays."""
    return list(dict.fromkeys(map(memory_of, replaced.values())))
