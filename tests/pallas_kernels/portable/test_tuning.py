"""The portable kernels' heuristics give what fits."""

from pallas_kernels.portable.tuning import RESERVED_BYTES, SMEM_BYTES, TILE_ROWS, heuristic, smem_bytes, tile_rows


def test_every_heuristic_config_fits():
    for rows in TILE_ROWS:
        for num_weights in (1, 2):
            for width in (64, 128, 192, 2048, 14336):
                config = heuristic(rows, num_weights, width)
                assert width % config.columns == 0
                assert smem_bytes(config, rows, num_weights) + RESERVED_BYTES <= SMEM_BYTES
    assert {tile_rows(pairs, 128) for pairs in (1, 64, 4096, 65536, 10**6)} == set(TILE_ROWS)
