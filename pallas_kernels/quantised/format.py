"""The formats of quantised weights as data; without jax, so that configs can name them.

A new format is a file that has its `Codec`, and a line in `codecs.CODECS`.
"""

from dataclasses import dataclass
from typing import Literal

Layout = Literal["rows", "hopper"]
"""How values lie in memory: in rows, or in the order in which the Hopper kernels unpack them (`packing.py`)."""


@dataclass(frozen=True)
class Format:
    """How the matrices of a `Quantised` are stored.

    Attributes:
      name: of the format.
      codec: what the bits of its values and scales mean: a name of `codecs.CODECS`.
      block: rows and columns that share a scale; 0 for all of them.
      per_byte: values that a byte holds.
      layout: of the values.
    """

    name: str
    codec: str
    block: tuple[int, int]
    per_byte: int = 1
    layout: Layout = "rows"

    def scales_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of a matrix's scales.

        Args:
          rows: of the matrix.
          columns: of the matrix.
        """
        height, width = self.block
        return (-(-rows // height) if height else 1, -(-columns // width) if width else 1)


FP8_BLOCK = Format("fp8_block", "fp8", (128, 128))
FP8_CHANNEL = Format("fp8_channel", "fp8", (1, 0))
FP8_TENSOR = Format("fp8_tensor", "fp8", (0, 0))
MXFP4 = Format("mxfp4", "mxfp4", (1, 32), 2)
NVFP4 = Format("nvfp4", "nvfp4", (1, 16), 2)
UNIT = 64  # rows and columns that the layout for the Hopper kernels keeps together
INT4_GROUP = 32  # columns of a group where a caller names none


def fp8_block(rows: int, columns: int) -> Format:
    """fp8 with a scale per block of another size than 128 x 128.

    Args:
      rows: of a block.
      columns: of a block.
    """
    return Format("fp8_block", "fp8", (rows, columns))


def int4(group: int = INT4_GROUP, zero_points: bool = False) -> Format:
    """int4 with a scale for each `group` columns of a row.

    Args:
      group: columns that share a scale.
      zero_points: each group also has the code that means zero; else that is 8.
    """
    name = "int4_zero" if zero_points else "int4"
    return Format(name, name, (1, group), 2)


FORMATS = {
    format.name: format for format in (FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, int4(), int4(zero_points=True), NVFP4)
}
"""Format by name; int4 with groups of 32."""
