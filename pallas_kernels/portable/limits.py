"""Sizes that kernels with a row per warp are bound by; without Mosaic."""

ROWS = 4  # the warps of a block
LANES = 32
