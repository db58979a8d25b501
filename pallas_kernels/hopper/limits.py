"""What a Hopper GPU and its ring stages allow: sizes that configs and plans follow, without Mosaic."""

DEPTH = 64  # elements of K that one ring stage holds: one 128-byte swizzle row of a 16-bit type
COMPUTE_WARPGROUPS = 2  # most
HALF = 64  # rows of a weight that one ring stage holds for a compute warpgroup, twice
ROW_ALIGNMENT = 8  # of a tile's first row: TMA reads tiles of 8 rows
# Two warpgroups at 232 registers a thread and one at 40 fill the register file; 240 would hang the GPU silently.
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40
SMEM_BYTES = 232_448  # a block's shared memory on sm_90
BARRIER_BYTES = 1024  # room for barriers and alignment
