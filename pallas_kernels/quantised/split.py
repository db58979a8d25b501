"""How the arrays of a quantised matrix are split over a mesh where the matrix is: along its axes, in whole blocks."""

from dataclasses import replace
from typing import Any

from jax.sharding import PartitionSpec as P

from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.format import UNIT, Format


def split_specs(weight: Quantised, spec: P) -> Quantised:
    """How each array of a quantised weight is split.

    A scale of several rows or columns lies where they do; one of all rows, or of all columns, is whole along them.

    Args:
      weight: its arrays, or what stands for them.
      spec: how the matrix that it stands for is split, `[..., out, in]`.

    Returns:
      A tree of its form with a `PartitionSpec` for each array.
    """
    *leading, rows, columns = (*spec, *[None] * (weight.ndim - len(spec)))
    height, width = weight.format.block
    of_scales = P(*leading, rows if height else None, columns if width else None)
    if weight.format.layout == "hopper" and weight.format.codec != "fp8":
        of_scales = P(*leading, None, None)  # none are there: values have them beside
    specs: dict[str, Any] = {"values": P(*leading, rows, columns), "scales": of_scales}
    if weight.zero_points is not None:
        specs["zero_points"] = of_scales
    if weight.global_scale is not None:
        specs["global_scale"] = P(*leading)
    return replace(weight, **specs)


def cut_block(format: Format, rows: int, columns: int, parts: tuple[int, int]) -> str:
    """What of a matrix a split would cut through, such as `blocks of 32 columns`; empty where it cuts none.

    Args:
      format: the matrix's.
      rows: of the matrix.
      columns: of the matrix.
      parts: into so many its rows and its columns are split.
    """
    unit = UNIT if format.layout == "hopper" else 1
    steps = [max(step, unit) for step in format.block]
    for name, size, step, count in zip(("rows", "columns"), (rows, columns), steps, parts, strict=True):
        if count > 1 and step > 1 and size // count % step:
            return f"blocks of {step} {name}"
    return ""
