"""Quantised weights hold the numbers that their formats say, for every pattern of bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.errors import InputError
from pallas_kernels.ops import Quantised, dequantise, quantise
from pallas_kernels.quantised.api import check
from pallas_kernels.quantised.format import FORMATS, FP8_BLOCK, FP8_TENSOR, MXFP4, NVFP4, int4
from support.quantised_files import E2M1, E4M3, nearest, spread

BYTES = np.arange(256, dtype=np.uint8)
PAIRS = np.stack((BYTES & 15, BYTES >> 4), axis=-1).reshape(-1)  # the codes of all bytes, the low ones first
TINY = 2.0**-124
GROUPS = {"fp8_block": (128, 128), "fp8_channel": (1, 192), "fp8_tensor": (160, 192), "mxfp4": (1, 32)} | {
    "int4": (1, 32),
    "int4_zero": (1, 32),
    "nvfp4": (1, 16),
}


def bits(values, dtype):
    return np.asarray(values, dtype).view(np.uint32 if dtype == np.float32 else np.uint16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_byte_of_fp8_is_its_number(dtype):
    codes = BYTES[(BYTES & 0x7F) != 0x7F]
    values = jnp.asarray(codes[None])
    found = dequantise(Quantised(values, jnp.full((1, 1), 0.75), FP8_TENSOR), dtype)
    expected = (E4M3[codes] * np.float32(0.75))[None].astype(jnp.dtype(dtype))
    assert (bits(found, jnp.dtype(dtype)) == bits(expected, jnp.dtype(dtype))).all()


def test_every_byte_of_mxfp4_is_its_numbers_with_every_exponent():
    exponents = np.arange(253, dtype=np.uint8)  # beyond, 6 is no float32
    values, scales = np.tile(BYTES, (253, 1)), np.repeat(exponents[:, None], 16, axis=1)
    found = np.asarray(dequantise(Quantised(jnp.asarray(values), jnp.asarray(scales), MXFP4), jnp.float32))
    expected = E2M1[PAIRS].astype(np.float64)[None] * 2.0 ** (exponents[:, None] - 127.0)
    normal = np.abs(expected) >= TINY
    assert normal.sum() > 250 * 400
    assert (bits(found, np.float32) == bits(expected, np.float32))[normal].all()
    assert (np.abs(found) <= np.abs(expected))[~normal].all()


def test_every_byte_of_int4_is_its_numbers_with_every_zero_point():
    values, points = jnp.asarray(np.tile(BYTES, (16, 1))), np.repeat(np.arange(16)[:, None], 16, axis=1)
    scales = jnp.full((16, 16), 0.3, jnp.bfloat16)
    scale = np.float32(np.asarray(scales)[0, 0])
    zeros = Quantised(values, scales, int4(32, True), zero_points=jnp.asarray(points, jnp.uint8))
    expected = (PAIRS.astype(np.float32)[None] - np.arange(16, dtype=np.float32)[:, None]) * scale
    assert (bits(dequantise(zeros, jnp.float32), np.float32) == bits(expected, np.float32)).all()
    symmetric = dequantise(Quantised(values, scales, int4(32)), jnp.float32)
    assert (bits(symmetric[0], np.float32) == bits(expected[8], np.float32)).all()


def test_every_byte_of_nvfp4_is_its_numbers_with_every_scale():
    codes = BYTES[(BYTES & 0x7F) != 0x7F]
    values, scales = np.tile(BYTES, (len(codes), 1)), np.repeat(codes[:, None], 32, axis=1)
    whole = np.float32(0.0123)
    weight = Quantised(
        jnp.asarray(values),
        jnp.asarray(scales),
        NVFP4,
        global_scale=jnp.asarray(whole),
    )
    expected = E2M1[PAIRS][None] * (E4M3[codes] * whole)[:, None]
    assert (bits(dequantise(weight, jnp.float32), np.float32) == bits(expected, np.float32)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_quantise_finds_the_nearest_number_that_the_block_has(name):
    array = np.random.default_rng(0).standard_normal((160, 192)).astype(np.float32)
    weight = quantise(jnp.asarray(array), name)
    check("weight", weight)
    found = np.asarray(dequantise(weight, jnp.float32))
    scales = np.asarray(weight.scales.astype(jnp.float32))
    if name == "mxfp4":
        scales = 2.0 ** (np.asarray(weight.scales) - 127.0)
    elif name == "nvfp4":
        scales = E4M3[np.asarray(weight.scales)] * np.asarray(weight.global_scale)
    table = E4M3 if "fp8" in name else E2M1 if "fp4" in name else np.arange(-8, 8, dtype=np.float32)
    each = spread(scales, array.shape, GROUPS[name])
    if name == "int4_zero":
        points = spread(np.asarray(weight.zero_points).astype(np.float32), array.shape, GROUPS[name])
        best = (np.round(array / each + points).clip(0, 15) - points) * each
    else:
        best = table[nearest(array / each, table)] * each
    assert weight.shape == array.shape
    assert np.abs(found - array).max() <= np.abs(best - array).max() * (1 + 1e-5)
    assert np.linalg.norm(found - array) <= np.linalg.norm(best - array) * (1 + 1e-5)
    error = np.linalg.norm(found - array) / np.linalg.norm(array)
    assert error < (0.03 if "fp8" in name else 0.13)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_stay_zeros_and_a_stack_is_its_matrices(name):
    array = jnp.zeros((3, 32, 64)).at[1].set(0.5).at[2, 3, 5].set(-7.0)
    weight = quantise(array, name)
    check("weight", weight)
    numbers = dequantise(weight, jnp.float32)
    assert weight.shape == (3, 32, 64)
    assert not numbers[0].any()
    for expert in range(3):
        assert (dequantise(weight[expert], jnp.float32) == numbers[expert]).all()
    np.testing.assert_allclose(numbers[2, 3, 5], -7.0, rtol=0.15)


def test_blocks_end_with_the_matrix():
    array = jnp.asarray(np.random.default_rng(0).standard_normal((160, 192)), jnp.float32)
    weight = quantise(array, FP8_BLOCK)
    assert weight.scales.shape == (2, 2)
    each = spread(np.asarray(weight.scales), (160, 192), (128, 128))
    expected = E4M3[np.asarray(weight.values)] * each
    assert (np.asarray(dequantise(weight, jnp.float32)) == expected).all()


def test_arrays_that_do_not_belong_together_are_refused_by_name():
    good = quantise(jnp.ones((2, 32, 64)), MXFP4)
    with pytest.raises(InputError, match=r"gate.scales are uint8 \[2, 32, 1\]; expected uint8 \[2, 32, 2\] for mxfp4"):
        check("gate", Quantised(good.values, good.scales[..., :1], MXFP4))
    with pytest.raises(InputError, match=r"gate.values are float32 .*; expected uint8"):
        check("gate", Quantised(good.values.astype(jnp.float32), good.scales, MXFP4))
    with pytest.raises(InputError, match=r"gate.zero_points is uint8 .*; expected none for mxfp4"):
        check("gate", Quantised(good.values, good.scales, MXFP4, zero_points=good.scales))
    with pytest.raises(InputError, match=r"gate.global_scale is missing; expected float32 \[2\] for nvfp4"):
        check("gate", Quantised(good.values, jnp.ones((2, 32, 4), jnp.uint8), NVFP4))


@pytest.mark.parametrize(
    ("shape", "format", "named"),
    [((4, 48), "mxfp4", "multiples of 32"), ((64,), "fp8_block", r"\[64\]"), ((4, 64), "fp3", "'fp3'.*fp8_block")],
)
def test_what_cannot_be_quantised_is_refused_by_name(shape, format, named):
    with pytest.raises(InputError, match=named):
        quantise(jnp.ones(shape), format)
