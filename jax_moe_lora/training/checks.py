"""Checks of what a trainer is given, before any work."""

import math
import re
from collections.abc import Mapping
from typing import Any, get_args

from jax.sharding import Mesh

from jax_moe_lora.arguments import INT32, number, one_of, whole
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.dtypes import TRAINING_NAMES, check_dtype
from jax_moe_lora.mesh.steps import row_multiple
from jax_moe_lora.training.forms import ExtraColumns
from jax_moe_lora.training.run_folder import RESERVED

DEFAULT_WIDTH = 512


def check_names(data: Mapping[str, Any], **others: Mapping[str, Any]) -> None:
    """Refuses names that cannot be folders, and names in `others` that `data` lacks."""
    for argument, names in {"data": data, **others}.items():
        if not isinstance(names, Mapping):
            raise InputError(f"{argument} is a {type(names).__name__}; expected a dictionary by the adapters' names.")
    if not data:
        raise InputError("data names no adapter; give at least one, with its examples.")
    for name in data:
        fits = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name)
        if not fits or name in (*RESERVED, "__base__"):
            raise InputError(
                f"Adapter name {name!r} cannot be a folder's; expected letters, digits, '-', '_' and '.', and none of "
                f"{', '.join((*RESERVED, '__base__'))}."
            )
    for argument, names in others.items():
        for name in names:
            if name not in data:
                raise InputError(f"{argument} names {name!r}, which is none of the adapters {', '.join(data)}.")


def check_length(steps: int | None, epochs: float | None) -> tuple[int | None, float | None]:
    """The length of a run, which is given once, in steps or in epochs."""
    if (steps is None) == (epochs is None):
        raise InputError(f"steps is {steps} and epochs is {epochs}; give one of them.")
    if steps is not None:
        return whole("steps", steps, 1), None
    return None, number("epochs", epochs, lambda value: 0 < value < math.inf, "a number above zero")


def steps_of(epochs: float, most_rows: int, adapters: int, batch_size: int) -> int:
    """Steps after which the adapter with the most rows has seen each of them `epochs` times."""
    steps = epochs * most_rows * adapters / batch_size
    return whole("steps", max(1, math.ceil(min(steps, 2.0**32) - 1e-9)), 1, INT32)


def check_training_dtype(dtype: str) -> None:
    """Refuses dtypes of the frozen model that training does not run in."""
    if dtype == "float16":
        raise InputError("dtype is 'float16', which has no room for gradients; use bfloat16 or float32.")
    check_dtype(dtype, TRAINING_NAMES)


def check_micro_batches(batch_size: int, micro_batches: int, adapters: int, mesh: Mesh | None) -> int:
    """The number of micro-batches, which divide a batch that has a row for every adapter, each of so many rows."""
    if batch_size < adapters:
        raise InputError(f"batch_size is {batch_size} for {adapters} adapters; give at least one row per adapter.")
    if batch_size % whole("micro_batches", micro_batches, 1):
        raise InputError(f"batch_size is {batch_size}, which {micro_batches} micro_batches do not divide.")
    check_rows(batch_size // micro_batches, row_multiple(mesh))
    return micro_batches


def check_rows(rows: int, multiple: int) -> None:
    """Refuses a micro-batch whose rows the `data` axis of a mesh does not divide."""
    if rows % multiple:
        raise InputError(
            f"A micro-batch has {rows} rows, which the mesh's data={multiple} does not divide; give a multiple."
        )


def row_width(sequence_length: int | None, max_positions: int) -> int:
    """Tokens per row."""
    if sequence_length is None:
        return min(DEFAULT_WIDTH, max_positions)
    return whole("sequence_length", sequence_length, 1, max_positions)


def check_extra_columns(extra_columns: str) -> ExtraColumns:
    """What to do with columns that a line's form does not have."""
    return one_of("extra_columns", extra_columns, get_args(ExtraColumns))
