"""Compiles the kernels to SASS for an H200 on a machine without a GPU; prints what ptxas said, a line of JSON each.

Runs in an environment of its own (`make .venv-cuda13/full.stamp`): jax's CUDA plugin and the CUDA compiler packages.
"""

import json
import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

DUMP = Path(tempfile.mkdtemp())
os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(DUMP), "MOSAIC_GPU_DUMP_PTXAS": "1"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from pallas_kernels import LoRAPages, make_plan  # noqa: E402
from pallas_kernels.activations import ACTIVATIONS  # noqa: E402
from pallas_kernels.dispatch import dispatch  # noqa: E402
from pallas_kernels.grouped_lora import hopper as lora  # noqa: E402
from pallas_kernels.grouped_matmul import hopper  # noqa: E402
from pallas_kernels.plan import Tiles  # noqa: E402
from pallas_kernels.steps import LoRASteps, make_steps  # noqa: E402
from pallas_kernels.tuning import Config, heuristic  # noqa: E402

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 memory_bandwidth: 4800000000000
  l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 80000000000
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability 9.0" name: "NVIDIA H200" device_address_bits: 64 driver_version: "13.0.0"
  runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.23.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 23 patch: 0 } device_description_str: "NVIDIA H200"
"""


def array(shape: tuple[int, ...], dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def tiles(size: int) -> Tiles:
    return Tiles(*[array((72,))] * 4, array(()), size)


def lora_steps(rows: int) -> LoRASteps:
    return LoRASteps(array((72, 64)), array((72, 64)), array((6, 72, 64)), 50, rows, 16)


def steps(slots: int, one_pool: bool):
    """The lists of a gated projection and of a plain one."""
    a, b = array((100, 16, 128), "bfloat16"), array((100, 16, 64), "bfloat16")
    pages = LoRAPages(a, b, array((slots, 8, 4)), array((slots, 8), "float32"), 40)

    def call(experts, of_token, pages, other_pool):
        other = replace(pages, a=pages.a if one_pool else other_pool)
        plan = make_plan(experts, of_token, 8, slots, "hopper")
        return make_steps(plan, ((pages, other), (pages,)))

    return call, (array((40, 2)), array((40,)), pages, a)


def matmul(config: Config, gated: bool, with_lora: bool, widths: tuple[int, int], dtype: str):
    depth, out = widths
    count = 2 if gated else 1
    weights = (array((8, out, depth), dtype),) * count
    steps = lora_steps(config.tile_rows) if with_lora else None
    hidden = array((50, config.tile_rows, 64), dtype) if with_lora else None
    pages = (array((100, 16, out), dtype),) * count if with_lora else ()
    unit = ACTIVATIONS["silu"] if gated else None

    def call(x, weights, tiles, steps, hidden, pages):
        return hopper.grouped_matmul(x, weights, tiles, config, unit, steps, hidden, pages)

    return call, (array((1024, depth), dtype), weights, tiles(config.tile_rows), steps, hidden, pages)


def shrink(rows: int, pools: int, width: int, dtype: str):
    def call(x, pools, tiles, steps):
        return lora.shrink(x, pools, tiles, steps)

    steps = lora_steps(rows)
    return call, (array((1024, width), dtype), (array((100, 16, width), dtype),) * pools, tiles(rows), steps)


def cases():
    for pairs, experts in ((64, 128), (1024, 128), (4096, 128), (16384, 128), (65536, 128)):
        config = heuristic(pairs, experts)
        for gated in (True, False):
            for with_lora in (True, False):
                name = f"matmul {config.form} {config.tile_rows} gated={gated} lora={with_lora}"
                yield name, *matmul(config, gated, with_lora, (2048, 768) if gated else (768, 2048), "bfloat16")
    yield "matmul float16, gpt-oss widths", *matmul(heuristic(100, 8), True, True, (2880, 2880), "float16")
    for rows in (8, 56, 128):
        yield f"shrink {rows}", *shrink(rows, 1, 2048, "bfloat16")
    yield "shrink of two pools, float16", *shrink(16, 2, 2880, "float16")
    for slots, one_pool in ((8, True), (32, False), (256, True)):
        yield f"steps of {slots} slots", *steps(slots, one_pool)
    for tokens, top_k, width in ((8, 8, 2048), (8192, 8, 2048), (100, 2, 7168)):
        rows = tokens * top_k + 64
        yield (
            f"dispatch {tokens}",
            lambda x, position, rows=rows: dispatch(x, position, rows),
            (array((tokens, width), "bfloat16"), array((tokens * top_k,))),
        )
    for tokens, experts in ((8, 128), (128, 128), (200, 256)):
        yield (
            f"plan {tokens}",
            lambda e, s, experts=experts: make_plan(e, s, experts, 8, "hopper"),
            (array((tokens, 8)), array((tokens,))),
        )


def main() -> None:
    device = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    seen: set[Path] = set()
    for name, call, arguments in cases():
        if not all(word in name for word in sys.argv[1:]):
            continue
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
        line = {"name": name, "error": None, "ptxas": []}
        try:
            with jax.default_device(device):
                jax.jit(call).lower(*placed).compile()
        except Exception as error:  # reported, and the other kernels still compile
            line["error"] = f"{type(error).__name__}: {error}"[:500]
        for file in sorted(set(DUMP.iterdir()) - seen):
            seen.add(file)
            text = file.read_text(errors="ignore")
            line["ptxas"] += re.findall(r".*(?:spill stores|registers|C75\d\d).*", text) if "ptxas" in file.name else []
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
