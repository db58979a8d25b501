"""Packed values on their way to wgmma: a unit's words become the bfloat16 registers of its first operand.

`registers_of` says which instructions on words of 32 bits that takes, two values each; a kernel carries them out
(`MosaicWords`), and so can a test with numpy.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.quantised.format import UNIT, Format
from pallas_kernels.quantised.packing import PLACEMENTS, SCALE_ROWS, Placement, words_of_scales

BOTH = 0x0001_0001  # a factor that repeats a half word
E4M3_POWER = 0x7B80  # bfloat16's 2^120: e4m3's bits, where bfloat16 has them, are numbers smaller by it
CODES_BASE = 0x4300  # bfloat16's 128, whose lowest bits count ones
MIDDLE = 0x4308  # 128 and the code that means zero
STEPS = 4  # of wgmma a unit, 16 columns each
WORDS = 4  # that a thread reads at once


class Words(Protocol):
    """What instructions do with words of 32 bits: two unsigned half words, or two numbers of bfloat16."""

    def constant(self, bits: int) -> Any:
        """A word of these bits."""

    def shift(self, word: Any, places: int) -> Any:
        """To the left, or to the right where `places` is negative."""

    def both(self, word: Any, other: Any) -> Any:
        """The bits that both have."""

    def either(self, word: Any, other: Any) -> Any:
        """The bits that one of them has."""

    def times(self, word: Any, factor: int) -> Any:
        """The integer times another."""

    def product(self, word: Any, other: Any) -> Any:
        """Of two pairs of bfloat16, each rounded once."""

    def difference(self, word: Any, other: Any) -> Any:
        """Likewise."""


def registers_of(words: Words, form: Format, values: Sequence[Any], scales: Sequence[Any]) -> list[Any]:
    """A thread's registers of one unit: for each 16 columns a0 .. a3.

    Args:
      words: the instructions.
      form: of the values.
      values: the thread's words.
      scales: the thread's words of scales.
    """
    each = len(values) // STEPS
    registers = []
    for step in range(STEPS):
        of_step = [bits for word in values[step * each :][:each] for bits in _bits(words, PLACEMENTS[form.codec], word)]
        registers += [_number(words, form, bits, scales, step, nth % 2) for nth, bits in enumerate(of_step)]
    return registers


def _bits(words: Words, placement: Placement, word: Any) -> list[Any]:
    """The values of a word, their bits where bfloat16 has them."""
    found = []
    for value in range(placement.values):
        masks: dict[int, int] = {}  # by shift: the fields that it brings to their places
        for field in placement.fields:
            if field.value == value:
                target = placement.target(field)
                shift = target - field.place
                masks[shift] = masks.get(shift, 0) | (((1 << field.bits) - 1) << target)
        parts = [
            words.both(words.shift(word, shift) if shift else word, words.constant(mask * BOTH))
            for shift, mask in masks.items()
        ]
        total = parts[0]
        for part in parts[1:]:
            total = words.either(total, part)
        found.append(total)
    return found


def _number(words: Words, form: Format, bits: Any, scales: Sequence[Any], step: int, lower: int) -> Any:
    """A pair of bfloat16 numbers of its bits.

    Args:
      words: the instructions.
      form: of the values.
      bits: of two values.
      scales: the thread's words of scales.
      step: which 16 columns.
      lower: 1 for a row of the lower eight.
    """
    if form.codec == "fp8":
        return words.product(bits, words.constant(E4M3_POWER * BOTH))
    if form.codec == "mxfp4":
        byte = words.shift(scales[0], -8 * (2 * (step // 2) + lower)) if step // 2 or lower else scales[0]
        exponent = words.both(byte, words.constant(0xFF))
        return words.product(bits, words.times(exponent, BOTH << 7))
    tables = 2 if form.codec == "int4_zero" else 1
    groups = len(scales) // tables
    group = step * groups // STEPS
    zero = _of_row(words, scales[groups + group], lower) if tables == 2 else words.constant(MIDDLE * BOTH)
    counted = words.difference(words.either(bits, words.constant(CODES_BASE * BOTH)), zero)
    return words.product(counted, _of_row(words, scales[group], lower))


def _of_row(words: Words, word: Any, lower: int) -> Any:
    """The lower or the upper half of a word, twice."""
    half = words.shift(word, -16) if lower else words.both(word, words.constant(0xFFFF))
    return words.times(half, BOTH)


class MosaicWords:
    """`Words` inside of a Mosaic kernel."""

    def constant(self, bits: int) -> Any:
        return utils.c(bits - (1 << 32) if bits >> 31 else bits, _i32())

    def shift(self, word: Any, places: int) -> Any:
        amount = self.constant(abs(places))
        return arith.shli(word, amount) if places > 0 else arith.shrui(word, amount)

    def both(self, word: Any, other: Any) -> Any:
        return arith.andi(word, other)

    def either(self, word: Any, other: Any) -> Any:
        return arith.ori(word, other)

    def times(self, word: Any, factor: int) -> Any:
        return arith.muli(word, self.constant(factor))

    def product(self, word: Any, other: Any) -> Any:
        return self._two("mul.rn.bf16x2", word, other)

    def difference(self, word: Any, other: Any) -> Any:
        return self._two("sub.rn.bf16x2", word, other)

    def _two(self, instruction: str, word: Any, other: Any) -> Any:
        """By name: subnormal numbers count, which `fastmath` or a flag could flush."""
        return llvm.inline_asm(_i32(), [word, other], f"{instruction} $0, $1, $2;", "=r,r,r")


def unpacked(form: Format, unit: Any) -> Any:
    """A unit of shared memory as wgmma's first operand, bfloat16 `[64, 64]`; fp8 without its scales."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((UNIT, UNIT), jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def load(context: Any, memory: Any) -> Any:
        del context
        base = utils.memref_ptr(memory)
        index = lambda value: utils.c(value, _i32())  # noqa: E731
        thread = arith.remui(utils.thread_idx(), index(utils.WARPGROUP_SIZE))

        def read(first: int, place: Any, count: int) -> list[Any]:
            """`count` neighbours from word `first + count * place` on."""
            start = arith.addi(arith.muli(place, index(count)), index(first))
            vector = ir.VectorType.get((count,), _i32())
            loaded = llvm.load(vector, utils.getelementptr(base, [start], _i32()), alignment=4 * count)
            return [llvm.extractelement(loaded, index(nth)) for nth in range(count)]

        size = UNIT * UNIT // (4 * form.per_byte)
        rounds = range(0, size, WORDS * utils.WARPGROUP_SIZE)
        values = [word for first in rounds for word in read(first, thread, WORDS)]
        rows = arith.shrui(thread, index(2))
        scales = [read(size + nth * SCALE_ROWS, rows, 1)[0] for nth in range(words_of_scales(form) // SCALE_ROWS)]
        registers = registers_of(MosaicWords(), form, values, scales)
        layout = fragmented_array.WGMMA_LAYOUT
        pairs = np.empty(layout.registers_shape((UNIT, UNIT)), dtype=object)
        for nth, register in enumerate(registers):
            pairs.flat[nth] = utils.bitcast(register, ir.VectorType.get((2,), ir.BF16Type.get()))
        return fragmented_array.FragmentedArray(_registers=pairs, _layout=layout, _is_signed=None)

    return load(unit)


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)
