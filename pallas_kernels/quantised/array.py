"""Quantised weights as a pytree, and the type of whatever may stand for a weight."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels.pytrees import pytree
from pallas_kernels.quantised.format import UNIT, Format


@pytree
@dataclass(frozen=True)
class Quantised:
    """A matrix in few bits, or a stack of them: `dequantise` says which numbers it holds.

    Leading axes (the experts) are the same in all arrays, so an index, a scan or `vmap` over them takes matrices out.

    Attributes:
      values: uint8 `[..., out, in]`, bits of float8_e4m3fn; or `[..., out, in / 2]`, two values of four bits a byte,
        the even column in the low bits. Packed for the Hopper kernels they are int32 (`packing.pack`).
      scales: `[..., rows, columns]` as `Format.scales_shape` says: float32 (fp8), any floating point (int4), or uint8:
        exponents (mxfp4), the bits of float8_e4m3fn (nvfp4).
      format: static.
      zero_points: uint8, of the scales' shape: the code that means zero (int4 with zero points).
      global_scale: float32 `[...]`, a factor on all scales of a matrix (nvfp4).
    """

    values: Array
    scales: Array
    format: Format = field(metadata={"static": True})
    zero_points: Array | None = None
    global_scale: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`[..., out, in]`: that of the array that it stands for."""
        if self.format.layout == "hopper":
            *leading, rows, columns, _, _ = self.values.shape
            return (*leading, rows * UNIT, columns * UNIT)
        *leading, columns = self.values.shape
        return (*leading, columns * self.format.per_byte)

    @property
    def ndim(self) -> int:
        """Axes of `shape`."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __len__(self) -> int:
        """Matrices of a stack, or rows of a matrix."""
        return self.shape[0]

    def __iter__(self) -> "Iterator[Quantised]":
        """The matrices of a stack."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> "Quantised":
        """Matrices of a stack, by an index of the leading axes."""
        return jax.tree.map(lambda leaf: leaf[index], self)


Weights = Array | Quantised
"""What may stand where a weight is read."""
