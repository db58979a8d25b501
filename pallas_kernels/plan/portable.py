"""The plan's sorted places for the portable kernels, which read and write whole tiles."""

from collections.abc import Sequence

from pallas_kernels.plan.tiles import RowLayout
from pallas_kernels.plan.xla import places
from pallas_kernels.portable import tuning
from pallas_kernels.quantised.format import Format

__all__ = ["layout", "places"]


def layout(pairs: int, num_experts: int, rows_per_tile: int | None = None, formats: Sequence[Format] = ()) -> RowLayout:
    """Experts begin where a tile may: at multiples of its rows."""
    rows = rows_per_tile or tuning.tile_rows(pairs, num_experts)
    return RowLayout(rows, rows, min(num_experts, pairs))
