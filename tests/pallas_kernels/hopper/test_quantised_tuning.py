"""How calls over packed weights are cut: valid for every shape, and the same order of sums with adapters or without."""

from dataclasses import replace

import pytest

from pallas_kernels.hopper.quantised_tuning import (
    MAX_ROWS,
    MAX_ROWS_FP8,
    QuantisedConfig,
    fits,
    heuristic,
    rows_per_tile,
    why_not,
)
from pallas_kernels.hopper.tuning import heuristic as heuristic_16_bits
from pallas_kernels.quantised.format import FP8_BLOCK, FP8_CHANNEL, MXFP4, int4
from pallas_kernels.quantised.packing import why_not_packed

FORMATS = (FP8_BLOCK, FP8_CHANNEL, MXFP4, int4(32), int4(128), int4(32, True))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name} of {form.block[1]}")
@pytest.mark.parametrize("columns", [128, 768, 2048, 2880, 7168, 14336])
def test_every_shape_fits_and_adapters_change_no_order(form, columns):
    for experts in (1, 8, 128, 256):
        for pairs in (1, 64, 1024, 4096, 65536):
            rows = rows_per_tile(heuristic_16_bits(pairs, experts).tile_rows, form)
            plain, adapted = (heuristic(pairs, experts, rows, columns, form, own) for own in (False, True))
            assert replace(adapted, stages=0) == replace(plain, stages=0)
            for config, adapters in ((plain, False), (adapted, True)):
                assert config.stages >= 2
                if not why_not_packed(form, 64, columns):
                    assert why_not(adapted, columns, form) == ""
                assert fits(config, form, adapters)
            if form == FP8_BLOCK:
                assert plain.units % 2 == 0, "a stage holds whole blocks"


def test_tiles_are_as_long_as_registers_allow():
    for rows in range(8, 200, 8):
        assert rows_per_tile(rows, MXFP4) == min(rows, MAX_ROWS)
        own = rows_per_tile(rows, FP8_BLOCK)
        assert own <= MAX_ROWS_FP8
        assert own % 8 == 0
        parts = -(-rows // MAX_ROWS_FP8)
        assert own * parts >= rows > own * parts - 8 * parts


@pytest.mark.parametrize(
    ("config", "form", "reason"),
    [
        (QuantisedConfig(20, 2, 2), MXFP4, "tile_rows is 20; expected a multiple of 8 up to 160 for mxfp4"),
        (QuantisedConfig(96, 2, 2), FP8_CHANNEL, "tile_rows is 96; expected a multiple of 8 up to 88"),
        (QuantisedConfig(8, 2, 2, 3), MXFP4, "warpgroups is 3; expected 1 or 2"),
        (QuantisedConfig(8, 0, 2), MXFP4, "units is 0; expected 1 or more"),
        (QuantisedConfig(8, 3, 2), FP8_BLOCK, "units is 3; expected a multiple of 2 that divides 16"),
        (QuantisedConfig(8, 6, 2), FP8_BLOCK, "units is 6; expected a multiple of 2 that divides 16"),
        (QuantisedConfig(8, 2, 1), MXFP4, "1 stages of 2 units are too few"),
        (QuantisedConfig(160, 16, 9), MXFP4, "9 stages of 16 units are too many bytes"),
    ],
    ids=str,
)
def test_a_cut_that_the_kernel_cannot_take_is_named(config, form, reason):
    assert why_not(config, 1024, form).startswith(reason)
