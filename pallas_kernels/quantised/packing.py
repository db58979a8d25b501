"""The layout of quantised matrices that the Hopper kernels stream, and the bits of their words.

A matrix is cut into units of 64 x 64 values, each of which a warpgroup multiplies at once. A unit holds words of 32
bits in the order in which wgmma takes its first operand from registers: for each 16 columns and each thread, the values
of its registers a0 .. a3, two neighbours in a row each. One neighbour lies in a word's low half, the other in its high
one, so that two are unpacked by one instruction. Four-bit values are followed by the scales of their 64 rows; fp8's
scales stay an array of their own.

Where the bits of a value lie in a half word is a table (`Placement`), and both ways follow from it: `pack` and `unpack`
here, and the kernels' `hopper_registers.py`.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, UInt32

from pallas_kernels.errors import InputError
from pallas_kernels.quantised import fp4
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.format import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, UNIT, Format

SCALE_ROWS = 32  # words that hold one scale of each of 64 rows, if two rows share a word
MAX_E8M0 = 128  # the largest exponent code whose numbers are finite on the way to bfloat16
E2M1_POWER = 126  # e2m1's bits, where bfloat16 has them, are numbers smaller by 2^126; exponents are stored with it


class Field(NamedTuple):
    """Some bits of a value in a half word.

    Attributes:
      value: which of the values that the half word holds.
      low: the lowest of its bits.
      bits: how many.
      place: of the lowest one in the half word.
    """

    value: int
    low: int
    bits: int
    place: int


@dataclass(frozen=True)
class Placement:
    """Where values lie in a half word, and where bfloat16 has their bits.

    Attributes:
      fields: of all values of a half word.
      sign: a value's sign bit, which belongs to bit 15; None where it has none.
      base: the place of a value's bit 0.
    """

    fields: tuple[Field, ...]
    sign: int | None
    base: int

    @property
    def values(self) -> int:
        """Values that a half word holds."""
        return 1 + max(field.value for field in self.fields)

    def target(self, field: Field) -> int:
        """Where the lowest bit of a field belongs in bfloat16."""
        return 15 if field.low == self.sign else field.low + self.base


# A value whose bits have the distances that bfloat16 wants is one shift and one mask; the last one takes what is left.
FP8 = Placement(
    (Field(0, 7, 1, 15), Field(0, 0, 7, 4), Field(1, 7, 1, 11), Field(1, 4, 3, 12), Field(1, 0, 4, 0)), 7, 4
)
E2M1 = Placement(
    (
        *(Field(nth, low, count, place - 3 * nth) for nth in range(3) for low, count, place in ((3, 1, 15), (0, 3, 6))),
        *(Field(3, 3, 1, 14), Field(3, 1, 2, 10), Field(3, 0, 1, 13)),
    ),
    sign=3,
    base=6,
)
CODES = Placement(tuple(Field(nth, 0, 4, 4 * nth) for nth in range(4)), sign=None, base=0)
PLACEMENTS = {"fp8": FP8, "mxfp4": E2M1, "int4": CODES, "int4_zero": CODES}


def words_of_scales(format: Format) -> int:
    """Words of a unit that hold scales."""
    if format.codec == "mxfp4":
        return SCALE_ROWS  # a byte for each row and 32 columns
    if format.codec in ("int4", "int4_zero"):
        groups = max(UNIT // format.block[1], 1) if format.block[1] else 1
        return SCALE_ROWS * groups * (2 if format.codec == "int4_zero" else 1)
    return 0


def unit_shape(format: Format) -> tuple[int, int]:
    """Words of a unit, in two axes that a TMA box can hold."""
    values = UNIT * UNIT // (4 * format.per_byte)
    return (8, values // 8) if format.codec == "fp8" else (4, (values + words_of_scales(format)) // 4)


def why_not_packed(format: Format, rows: int, columns: int) -> str:
    """Why the Hopper kernels cannot read matrices of a format; empty where they can.

    Args:
      format: of the matrices, in rows.
      rows: of a matrix.
      columns: of a matrix.
    """
    if format.codec not in PLACEMENTS:
        return f"they have no form for {format.name}"
    height, width = format.block
    if rows % UNIT or columns % UNIT:
        return f"rows and columns must be multiples of {UNIT}, these are {rows} x {columns}"
    if format.codec == "fp8" and format not in (FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR):
        return f"fp8 has a scale per 128 x 128 block, per row or one for all, this has one per {height} x {width}"
    if format == FP8_BLOCK and columns % width:
        return f"columns must be a multiple of {width}, these are {columns}"
    if format.codec.startswith("int4") and width and (columns % width or (width != 32 and width % UNIT)):
        return f"int4 has whole groups of 32 or of a multiple of {UNIT} columns, these are {width} of {columns}"
    return ""


def pack(weight: Quantised) -> Quantised:
    """A quantised weight in the layout that the Hopper kernels stream; the numbers that it holds stay the same.

    A scale of int4 is rounded to bfloat16, and fp8's one scale for a matrix becomes one for each row.

    Args:
      weight: `[..., out, in]`, in rows.

    Returns:
      The weight, with a `format` whose layout is `hopper`. Its values are int32 `[..., out / 64, in / 64, a, b]`;
      four-bit formats hold their scales there, and `scales` is empty.

    Raises:
      InputError: it is no quantised weight, the kernels have no form for it (`why_not_packed`), or it is packed
        already; or a scale of mxfp4 is beyond 2, with which numbers might be beyond bfloat16's. Where such a scale is
        traced, its numbers become infinite or NaN.
    """
    if not isinstance(weight, Quantised):
        raise InputError(f"Got {type(weight).__name__} to pack; expected a Quantised, as quantise makes it.")
    form = weight.format
    if form.layout != "rows":
        raise InputError(f"The weight is packed already ({form.layout}); expected one in rows.")
    if reason := why_not_packed(form, *weight.shape[-2:]):
        raise InputError(f"A weight in {form.name} cannot be packed for the Hopper kernels: {reason}.")
    if form.codec == "mxfp4" and not isinstance(weight.scales, jax.core.Tracer) and weight.scales.size:
        largest = int(weight.scales.max())
        if largest > MAX_E8M0:
            raise InputError(
                f"A weight in mxfp4 has the exponent code {largest}; the Hopper kernels take codes up to {MAX_E8M0}. "
                "Leave it in rows."
            )
    if form == FP8_TENSOR:
        form = FP8_CHANNEL
        weight = replace(weight, scales=jnp.broadcast_to(weight.scales, (*weight.shape[:-1], 1)), format=form)
    leading = weight.shape[:-2]
    flat = jax.tree.map(lambda leaf: leaf.reshape(math.prod(leading), *leaf.shape[len(leading) :]), weight)
    # One matrix after the other: only one at a time has a byte for each value.
    units = weight.shape[-2] // UNIT, weight.shape[-1] // UNIT
    values = lax.map(_packed, flat).reshape(*leading, *units, *unit_shape(form))
    scales = weight.scales if form.codec == "fp8" else jnp.zeros((*leading, 0, 0), weight.scales.dtype)
    return Quantised(values, scales, replace(form, layout="hopper"))


def unpack(weight: Quantised) -> Quantised:
    """The weight in rows whose packed form this is.

    Args:
      weight: as `pack` makes it. Scales of int4 come back as bfloat16, which they are there.

    Raises:
      InputError: it is in rows.
    """
    if weight.format.layout == "rows":
        raise InputError("The weight is in rows already; expected one that pack made.")
    form = replace(weight.format, layout="rows")
    *leading, rows, columns = weight.shape
    flat = weight.values.reshape(*leading, rows // UNIT, columns // UNIT, math.prod(unit_shape(form)))
    words = lax.bitcast_convert_type(flat, jnp.uint32)
    of_scales = words_of_scales(form)
    codes = _codes(words[..., : words.shape[-1] - of_scales], form)
    if form.codec == "fp8":
        return Quantised(codes, weight.scales, form)
    scales, zero_points = _read_scales(words[..., words.shape[-1] - of_scales :], form)
    return Quantised(fp4.pack(codes), scales, form, zero_points)


def _packed(weight: Quantised) -> Int[Array, "n k a b"]:
    """One matrix."""
    form, (rows, columns) = weight.format, weight.shape
    codes = weight.values if form.codec == "fp8" else fp4.nibbles(weight.values)
    placement = PLACEMENTS[form.codec]
    # Axes of a unit: columns in 16, warp, row in 8, pair of columns in 8; half, eight columns, eight rows.
    cut = codes.reshape(rows // UNIT, 4, 2, 8, columns // UNIT, 4, 2, 4, 2)
    values = cut.transpose(0, 4, 5, 1, 3, 7, 8, 6, 2).reshape(rows // UNIT, columns // UNIT, 4, 128, 2, 4)
    # A thread's registers, as many of them as a half word has values, are a word.
    per_word = values.reshape(*values.shape[:5], 4 // placement.values, placement.values)
    halves = _joined(per_word, placement)
    words = halves[..., 0, :] | (halves[..., 1, :] << 16)  # [n, k, 16 columns, thread, word]
    # A thread reads four words at once.
    words = words.reshape(*words.shape[:2], -1, 4 // words.shape[-1], 128, words.shape[-1])
    unit = jnp.swapaxes(words, 3, 4).reshape(rows // UNIT, columns // UNIT, -1)
    if form.codec != "fp8":
        unit = jnp.concatenate([unit, _scale_words(weight)], -1)
    return lax.bitcast_convert_type(unit, jnp.int32).reshape(*unit.shape[:2], *unit_shape(form))


def _codes(words: UInt32[Array, "*lead n k words"], format: Format) -> Array:
    """uint8 `[..., out, in]`, a byte each."""
    *leading, n, k, count = words.shape
    placement = PLACEMENTS[format.codec]
    each = 4 // placement.values
    words = jnp.swapaxes(words.reshape(*leading, n, k, count // 512, 128, 4 // each, each), -2, -3)
    halves = jnp.stack([words & 0xFFFF, words >> 16], -2)  # [..., 16 columns, thread, half, word]
    values = _separate(halves, placement).reshape(*leading, n, k, 4, 4, 8, 4, 2, 2, 2)
    lead = tuple(range(len(leading)))
    to_rows = (0, 3, 8, 4, 1, 2, 7, 5, 6)
    rows = values.transpose(*lead, *(len(leading) + axis for axis in to_rows))
    return rows.reshape(*leading, n * UNIT, k * UNIT)


def _joined(values: Array, placement: Placement) -> UInt32[Array, "*lead"]:
    """Half words of the values in the last axis."""
    wide = values.astype(jnp.uint32)
    parts = [((wide[..., f.value] >> f.low) & ((1 << f.bits) - 1)) << f.place for f in placement.fields]
    return sum(parts[1:], parts[0])


def _separate(halves: UInt32[Array, "*lead"], placement: Placement) -> Array:
    """The values of half words, in a new last axis."""
    values = [jnp.zeros_like(halves)] * placement.values
    for f in placement.fields:
        values[f.value] = values[f.value] | (((halves >> f.place) & ((1 << f.bits) - 1)) << f.low)
    return jnp.stack(values, -1).astype(jnp.uint8)


def _scale_words(weight: Quantised) -> UInt32[Array, "n k words"]:
    """Of one matrix: a word for the rows g and g + 8 of each 16, or with mxfp4 for their 64 columns too."""
    form, (rows, columns) = weight.format, weight.shape
    if form.codec == "mxfp4":
        # Bfloat16's exponents; 255 is infinity, so that a scale that is too large cannot pass for another.
        codes = jnp.minimum(weight.scales.astype(jnp.uint32) + E2M1_POWER, 255)
        codes = codes.reshape(rows // UNIT, 4, 2, 8, columns // UNIT, 2)
        codes = codes.transpose(0, 4, 1, 3, 5, 2).reshape(rows // UNIT, columns // UNIT, SCALE_ROWS, 4)
        return sum((codes[..., nth] << (8 * nth) for nth in range(1, 4)), codes[..., 0])
    scales = lax.bitcast_convert_type(weight.scales.astype(jnp.bfloat16), jnp.uint16)
    tables = [scales]
    if weight.zero_points is not None:
        points = weight.zero_points.astype(jnp.bfloat16) + 128
        tables.append(lax.bitcast_convert_type(points, jnp.uint16))
    return jnp.concatenate([_of_two_rows(table, form, columns) for table in tables], -1)


def _of_two_rows(table: Array, form: Format, columns: int) -> UInt32[Array, "n k words"]:
    """Sixteen bits for each row and group of columns; a group longer than a unit is repeated in each."""
    rows, groups = table.shape
    if form.block[1] != 32:
        table = jnp.repeat(table, columns // UNIT // groups, axis=1)
    each = table.shape[1] // (columns // UNIT)
    cut = table.astype(jnp.uint32).reshape(rows // UNIT, 4, 2, 8, columns // UNIT, each)
    cut = cut.transpose(0, 4, 5, 1, 3, 2).reshape(rows // UNIT, columns // UNIT, each * SCALE_ROWS, 2)
    return cut[..., 0] | (cut[..., 1] << 16)


def _read_scales(words: UInt32[Array, "*lead n k words"], form: Format) -> tuple[Array, Array | None]:
    """Scales and zero points as `Quantised` has them, of the words that `_scale_words` made."""
    *leading, n, k, _ = words.shape
    lead = tuple(range(len(leading)))

    def in_rows(parts: Array, each: int) -> Array:
        """`[..., n, k, each, 4, 8, 2]` -> `[..., rows, k * each]`."""
        to_rows = (0, 3, 5, 4, 1, 2)
        moved = parts.transpose(*lead, *(len(leading) + axis for axis in to_rows))
        return moved.reshape(*leading, n * UNIT, k * each)

    if form.codec == "mxfp4":
        parts = jnp.stack([(words >> (8 * nth)) & 0xFF for nth in range(4)], -1).reshape(*leading, n, k, 4, 8, 2, 2)
        parts = parts.transpose(*lead, *(len(leading) + axis for axis in (0, 1, 4, 2, 3, 5)))
        return (in_rows(parts, 2) - E2M1_POWER).astype(jnp.uint8), None
    each = 2 if form.block[1] == 32 else 1
    repeats = max(form.block[1] // UNIT, 1) if form.block[1] else k
    tables = []
    for table in jnp.split(words, 2 if form.codec == "int4_zero" else 1, axis=-1):
        parts = jnp.stack([table & 0xFFFF, table >> 16], -1).reshape(*leading, n, k, each, 4, 8, 2)
        bits = in_rows(parts, each)[..., ::repeats].astype(jnp.uint16)
        tables.append(lax.bitcast_convert_type(bits, jnp.bfloat16))
    zero_points = (tables[1] - 128).astype(jnp.uint8) if len(tables) == 2 else None
    return tables[0], zero_points
