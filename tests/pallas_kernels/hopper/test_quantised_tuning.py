"""How calls over packed weights are cut: valid for every shape, and the same order of sums with adapters or without."""

from dataclasses import replace

import pytest

from pallas_kernels.hopper.quantised_tuning import MAX_ROWS, MAX_ROWS_FP8, fits, heuristic, rows_per_tile
from pallas_kernels.hopper.tuning import heuristic as heuristic_16_bits
from pallas_kernels.quantised.format import FP8_BLOCK, FP8_CHANNEL, MXFP4, int4

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
