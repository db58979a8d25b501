"""The packed layout keeps every bit, and what the kernels make of its words in registers is what the format says.

The instructions are carried out by numpy on words of 32 bits (`NumpyWords`); the GPU tests do so with real ones.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import InputError
from pallas_kernels.ops import Quantised, dequantise, pack, quantise, unpack
from pallas_kernels.quantised.api import check
from pallas_kernels.quantised.format import FP8_BLOCK, FP8_CHANNEL, FP8_TENSOR, MXFP4, NVFP4, Format, int4
from pallas_kernels.quantised.fp8 import numbers_of
from pallas_kernels.quantised.hopper_registers import registers_of
from pallas_kernels.quantised.packing import MAX_E8M0, SCALE_ROWS, words_of_scales

FORMATS = {
    form.name + "".join(f" of {columns}" for columns in form.block[1:] if form.codec.startswith("int4")): form
    for form in (
        FP8_BLOCK,
        FP8_CHANNEL,
        FP8_TENSOR,
        MXFP4,
        int4(32),
        int4(64),
        int4(128),
        int4(64, True),
        int4(32, True),
    )
}
ROWS, COLUMNS = 192, 256
UNIT = 64


def draw(form: Format, lead: tuple[int, ...] = (), rng: np.random.Generator | None = None) -> Quantised:
    """Any bits of values, and scales that a checkpoint may hold."""
    rng = rng or np.random.default_rng()
    shape, scales_shape = (*lead, ROWS, COLUMNS), (*lead, *form.scales_shape(ROWS, COLUMNS))
    values = rng.integers(0, 256, (*lead, ROWS, COLUMNS // form.per_byte)).astype(np.uint8)
    zero_points = None
    if form.codec == "fp8":
        values = np.where(values & 0x7F == 0x7F, 0, values).astype(np.uint8)  # NaN
        scales = rng.uniform(1e-3, 2, scales_shape).astype(np.float32)
    elif form.codec == "mxfp4":
        scales = rng.integers(0, MAX_E8M0 + 1, scales_shape).astype(np.uint8)
    else:
        scales = jnp.asarray(rng.uniform(1e-3, 2, scales_shape), jnp.bfloat16)
        if form.codec == "int4_zero":
            zero_points = jnp.asarray(rng.integers(0, 16, scales_shape), jnp.uint8)
    weight = Quantised(jnp.asarray(values), jnp.asarray(scales), form, zero_points)
    assert weight.shape == shape
    check("weight", weight)
    return weight


def equal(one: Quantised, other: Quantised) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return one.format == other.format and all(a.dtype == b.dtype and bool((a == b).all()) for a, b in pairs)


class NumpyWords:
    """`hopper_registers.Words` for arrays of uint32."""

    def constant(self, bits):
        return np.uint32(bits)

    def shift(self, word, places):
        return word << np.uint32(places) if places > 0 else word >> np.uint32(-places)

    def both(self, word, other):
        return word & other

    def either(self, word, other):
        return word | other

    def times(self, word, factor):
        return (word.astype(np.uint64) * factor & 0xFFFFFFFF).astype(np.uint32)

    def product(self, word, other):
        return self._two(np.multiply, word, other)

    def difference(self, word, other):
        return self._two(np.subtract, word, other)

    def _two(self, operation, word, other):
        word, other = np.broadcast_arrays(word, other)
        pairs = [np.ascontiguousarray(w).view(jnp.bfloat16).astype(np.float32) for w in (word, other)]
        return operation(*pairs).astype(jnp.bfloat16).view(np.uint32)


def by_registers(weight: Quantised) -> np.ndarray:
    """The matrix that 128 threads' registers hold, where PTX's fragment layout of wgmma's first operand puts them."""
    form = weight.format
    rows, columns = weight.shape[0] // UNIT, weight.shape[1] // UNIT
    words = np.asarray(weight.values).reshape(rows, columns, -1).view(np.uint32)
    of_values = words.shape[-1] - words_of_scales(form)
    by_thread = words[..., :of_values].reshape(rows, columns, -1, 128, 4)
    values = [by_thread[:, :, nth, :, word] for nth in range(by_thread.shape[2]) for word in range(4)]
    thread = np.arange(128)
    scales = [
        words[..., of_values + nth * SCALE_ROWS + (thread >> 2)] for nth in range(words_of_scales(form) // SCALE_ROWS)
    ]
    registers = registers_of(NumpyWords(), form, values, scales)
    out = np.zeros((rows, columns, UNIT, UNIT), jnp.bfloat16)
    warp, lane = thread // 32, thread % 32
    for nth, register in enumerate(registers):
        step, part = divmod(nth, 4)
        row = 16 * warp + lane // 4 + 8 * (part % 2)
        column = 16 * step + 2 * (lane % 4) + 8 * (part // 2)
        pair = np.ascontiguousarray(register).view(jnp.bfloat16).reshape(rows, columns, 128, 2)
        out[:, :, row, column], out[:, :, row, column + 1] = pair[..., 0], pair[..., 1]
    return out.transpose(0, 2, 1, 3).reshape(weight.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_a_packed_weight_is_the_same_weight(name):
    weight = draw(FORMATS[name], (2,))
    packed = jax.jit(pack)(weight)
    check("weight", packed)
    assert packed.shape == weight.shape
    assert packed.ndim == 3
    assert (dequantise(packed, jnp.float32) == dequantise(weight, jnp.float32)).all()
    if FORMATS[name] == FP8_TENSOR:
        assert packed.format == replace(FP8_CHANNEL, layout="hopper")
    else:
        assert equal(unpack(packed), weight)
        assert packed.nbytes <= weight.nbytes * 1.001 + weight.values.nbytes * (1 / 16 if "int4" in name else 0)


@pytest.mark.parametrize("name", FORMATS)
def test_registers_hold_the_numbers_of_the_format_bit_for_bit(name):
    weight = draw(FORMATS[name])
    found = by_registers(pack(weight))
    if weight.format.codec == "fp8":  # scales are factors of the sums
        expected = numbers_of(weight.values).astype(jnp.bfloat16)
    elif weight.format.codec == "mxfp4":
        # With numpy, since XLA takes subnormal numbers for zero.
        codes = np.asarray(weight.values)
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float64)
        numbers = table[np.stack((codes & 15, codes >> 4), -1).reshape(ROWS, COLUMNS)]
        scales = 2.0 ** (np.asarray(weight.scales).astype(np.float64) - 127)
        expected = (numbers * np.repeat(scales, 32, axis=1)).astype(jnp.bfloat16)
    else:
        expected = dequantise(weight, jnp.bfloat16)
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.parametrize(
    ("form", "shape", "reason"),
    [
        (NVFP4, (64, 64), "they have no form for nvfp4"),
        (MXFP4, (96, 64), "multiples of 64, these are 96 x 64"),
        (Format("fp8_block", "fp8", (64, 64)), (64, 64), "per 128 x 128 block, per row or one for all, .* 64 x 64"),
        (FP8_BLOCK, (64, 192), "columns must be a multiple of 128, these are 192"),
        (int4(96), (64, 192), "whole groups of 32 or of a multiple of 64 columns, these are 96 of 192"),
        (int4(128), (64, 192), "whole groups of 32 or of a multiple of 64 columns, these are 128 of 192"),
    ],
)
def test_what_the_kernels_have_no_form_for_is_refused(form, shape, reason):
    values = jnp.zeros((shape[0], shape[1] // form.per_byte), jnp.uint8)
    weight = Quantised(values, jnp.zeros(form.scales_shape(*shape), jnp.float32), form)
    with pytest.raises(InputError, match=f"cannot be packed for the Hopper kernels: .*{reason}"):
        pack(weight)


@pytest.mark.parametrize("code", [129, 130, 255])
def test_a_scale_beyond_the_kernels_is_refused_or_becomes_no_number(code):
    weight = quantise(jnp.ones((64, 64)), MXFP4)
    weight = replace(weight, scales=weight.scales.at[0, 0].set(code))
    with pytest.raises(InputError, match=f"exponent code {code}; the Hopper kernels take codes up to 128"):
        pack(weight)
    numbers = by_registers(jax.jit(pack)(weight)).astype(np.float32)
    assert not np.isfinite(numbers[0, :32]).any()
    assert (numbers[1:] == 1).all(), "another row's scale"
    assert (numbers[0, 32:] == 1).all()


@pytest.mark.parametrize("name", ["fp8_block", "mxfp4", "int4_zero"])
def test_a_stack_of_no_experts_is_packed(name):
    packed = pack(quantise(jnp.ones((0, 64, 128)), name))
    assert packed.shape == (0, 64, 128)
    assert unpack(packed).shape == (0, 64, 128)


def test_a_stack_is_as_long_as_it_has_matrices():
    stack = quantise(jnp.ones((3, 64, 64)), MXFP4)
    for weights in (stack, pack(stack)):
        assert len(weights) == len(list(weights)) == 3
        assert all(weight.shape == (64, 64) for weight in weights)


def test_scales_of_other_dtypes_come_back_as_the_kernels_read_them():
    weight = quantise(jnp.full((64, 64), 458600.0), int4(32), "float16")
    assert unpack(pack(weight)).scales.dtype == jnp.bfloat16
    assert jnp.isfinite(dequantise(pack(weight), jnp.float32)).all()


def test_a_packed_weight_is_packed_once_and_checked_by_name():
    packed = pack(quantise(jnp.ones((2, 64, 128)), "fp8_block"))
    with pytest.raises(InputError, match="packed already"):
        pack(packed)
    with pytest.raises(InputError, match="in rows already"):
        unpack(quantise(jnp.ones((64, 64)), MXFP4))
    with pytest.raises(InputError, match=r"to pack; expected a Quantised, as quantise makes it"):
        pack(jnp.ones((64, 64)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"gate.values are uint8 .*; expected int32 \[..., 8, 128\]"):
        check("gate", replace(packed, values=packed.values.astype(jnp.uint8)))
    with pytest.raises(
        InputError, match=r"gate.scales are float32 \[2, 1\]; expected float32 \[2, 1, 1\], as pack makes"
    ):
        check("gate", replace(packed, scales=packed.scales[..., 0]))
    with pytest.raises(InputError, match=r"gate.scales are bfloat16 \[2, 1, 1\]; expected float32"):
        check("gate", replace(packed, scales=packed.scales.astype(jnp.bfloat16)))
    with pytest.raises(InputError, match=r"gate\.global_scale is there; expected none beside packed values"):
        check("gate", replace(packed, global_scale=jnp.ones(2)))
    with pytest.raises(
        InputError, match="gate is nvfp4 in the layout of the Hopper kernels, which have no form for it"
    ):
        check("gate", replace(packed, format=replace(NVFP4, layout="hopper")))
