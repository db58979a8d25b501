"""Compiles the kernels to SASS on a machine without a GPU; prints what ptxas said, a line of JSON each.

`compile_kernels.py hopper h200 1/1`, or `compile_kernels.py portable GPU 1/1` with a name of `GPUS`: one GPU a process,
in an environment of its own (`make .venv-cuda13/full.stamp`) with jax's CUDA plugin and the CUDA compiler packages.
`2/3` is every third kernel from the second on; a pattern after it picks the kernels whose names it is found in.
"""

import json
import os
import re
import sys
import tempfile
from dataclasses import replace
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a kept program says nothing of how it was compiled

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.activations import ACTIVATIONS, Activation, gated_unit
from pallas_kernels.dispatch.hopper import Gaps, dispatch
from pallas_kernels.grouped_lora import hopper_gradients, hopper_shrink, portable_shrink
from pallas_kernels.grouped_matmul import hopper_kernel, hopper_quantised_kernel, portable_kernel
from pallas_kernels.grouped_matmul.hopper_kernel import MatmulOperands
from pallas_kernels.hopper.quantised_tuning import MAX_ROWS, rows_per_tile
from pallas_kernels.hopper.quantised_tuning import heuristic as quantised_heuristic
from pallas_kernels.hopper.tuning import HopperConfig, heuristic
from pallas_kernels.lora_steps.api import LoRASteps, StepLayout, forward_plan_and_steps
from pallas_kernels.lora_steps.xla import PackedSteps
from pallas_kernels.ops import ExpertWeights, LayerPages, LoRAPages, make_plan, pack, quantise, routed_experts
from pallas_kernels.plan.tiles import Tiles
from pallas_kernels.portable.tuning import TILE_ROWS
from pallas_kernels.portable.tuning import heuristic as portable_heuristic
from pallas_kernels.quantised.format import FP8_BLOCK, FP8_CHANNEL, MXFP4, Format, int4
from support.decode_kernels import decode_cases

# The cases without a name of one have silu, and clamped_swiglu where there are biases.
OTHER_ACTIVATIONS = tuple(name for name in ACTIVATIONS if name not in ("silu", "clamped_swiglu"))

# Compute capability, shared memory of a block and of an SM, SMs.
GPUS = {
    "a100": ((8, 0), 166912, 167936, 108),
    "l40s": ((8, 9), 101376, 102400, 142),
    "h200": ((9, 0), 232448, 233472, 132),
    "b200": ((10, 0), 232448, 233472, 148),
    "rtx6000pro": ((12, 0), 101376, 102400, 188),
}


def target(name: str) -> str:
    """The text that describes a GPU to XLA."""
    (major, minor), block_smem, smem, cores = GPUS[name]
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {smem} shared_memory_per_block_optin: {block_smem} threads_per_core_limit: 2048
  core_count: {cores} fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64 memory_bandwidth: 4800000000000
  l2_cache_size: 62914560 clock_rate_ghz: 1.98 device_memory_size: 80000000000
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}" name: "{name}" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.23.0"
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 23 patch: 0 }} device_description_str: "{name}"
"""


def array(shape: tuple[int, ...], dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def tiles(size: int) -> Tiles:
    return Tiles(*[array((72,))] * 4, array(()), size)


def steps_of(kernel, rows: int) -> LoRASteps | PackedSteps:
    if "portable" in kernel.__module__:
        return PackedSteps(array((73,)), array((200, 6)))
    return LoRASteps(
        array((72, 64)), array((72, 64)), array((6, 72, 64)), 50, rows, 16, StepLayout(1, True, 8, 64, False)
    )


def steps(slots: int, one_pool: bool, tokens: int = 40, top_k: int = 2):
    """The lists of a gated projection and of a plain one; of at most 8 tokens with the plan."""
    a, b = array((100, 16, 128), "bfloat16"), array((100, 16, 64), "bfloat16")
    pages = LoRAPages(a, b, array((slots, 8, 4)), array((slots, 8), "float32"), 40)

    def call(experts, of_token, pages, other_pool):
        other = replace(pages, a=pages.a if one_pool else other_pool)
        plan = make_plan(experts, of_token, 8, slots, "hopper")
        adapters = LayerPages.from_modules({"gate": pages, "up": other, "down": pages})
        plan, lists = forward_plan_and_steps(plan, (adapters.select("gate", "up"), adapters.select("down")))
        return plan.tiles, lists

    return call, (array((tokens, top_k)), array((tokens,)), pages, a)


def layer_of_few_tokens(with_lora: bool):
    """A whole layer of 3 tokens, fewer than a tile has rows."""
    a, b = array((100, 16, 2048), "bfloat16"), array((100, 16, 768), "bfloat16")
    table = array((8, 128, 4)), array((8, 128), "float32")

    def call(x, weights, chosen, slots, gate, down, a, b, table):
        modules = {"gate": (a, b), "up": (a, b), "down": (b, a)}
        pages = LayerPages.from_modules({name: LoRAPages(*pools, *table, 40) for name, pools in modules.items()})
        plan = make_plan(chosen, slots, 128, 8 if with_lora else 0, "hopper")
        experts = ExpertWeights(gate, gate, down)
        return routed_experts(x, weights, experts, pages if with_lora else None, plan)

    matrices = array((128, 768, 2048), "bfloat16"), array((128, 2048, 768), "bfloat16")
    ids = array((3, 8), "float32"), array((3, 8)), array((3,))
    return call, (array((3, 2048), "bfloat16"), *ids, *matrices, a, b, table)


def matmul(
    kernel,
    config,
    rows: int,
    gated: bool,
    with_lora: bool,
    widths: tuple[int, int],
    dtype: str,
    biases: bool = False,
    activation: Activation | None = None,
):
    depth, out = widths
    count = 2 if gated else 1
    weights = (array((8, out, depth), dtype),) * count
    steps = steps_of(kernel, rows) if with_lora else None
    hidden = array((50, rows, 64), dtype) if with_lora else None
    pages = (array((100, 16, out), dtype),) * count if with_lora else ()
    activation = activation or ("clamped_swiglu" if biases else "silu")
    unit = partial(gated_unit, activation) if gated else None
    added = (array((8, out), dtype),) * count if biases else (None,) * count

    def call(x, weights, tiles, steps, hidden, pages, added):
        return kernel(x, weights, tiles, config, unit, steps, hidden, pages, added)

    return call, (array((1024, depth), dtype), weights, tiles(rows), steps, hidden, pages, added)


def hopper_matmul(
    config: HopperConfig,
    gated: bool,
    with_lora: bool,
    widths: tuple[int, int],
    dtype: str,
    biases: bool = False,
    keep: bool = False,
    activation: Activation | None = None,
):
    def kernel(x, weights, tiles, config, unit, steps, hidden, pages, added):
        return hopper_kernel.grouped_matmul(
            (MatmulOperands(x, weights, steps, hidden, pages),), tiles, config, unit, added, keep=keep
        )

    kernel.__module__ = hopper_kernel.__name__
    return matmul(kernel, config, config.tile_rows, gated, with_lora, widths, dtype, biases, activation)


def packed_matmul(form: Format, gated: bool, with_lora: bool, widths: tuple[int, int], pairs: int, rows: int):
    """Over packed weights of that format."""
    config = quantised_heuristic(pairs, 8, rows, widths[0], form, with_lora)

    def kernel(x, weights, tiles, config, unit, steps, hidden, pages, added):
        source = MatmulOperands(x, weights, steps, hidden, pages)
        return hopper_quantised_kernel.grouped_matmul(source, tiles, config, unit, added)

    kernel.__module__ = hopper_quantised_kernel.__name__
    call, (x, weights, *others) = matmul(kernel, config, rows, gated, with_lora, widths, "bfloat16")
    own = jax.eval_shape(lambda w: pack(quantise(w, form)), weights[0])
    return call, (x, (own,) * len(weights), *others)


def portable_matmul(
    rows: int,
    gated: bool,
    with_lora: bool,
    widths: tuple[int, int],
    dtype: str,
    biases: bool = False,
    activation: Activation | None = None,
):
    config = portable_heuristic(rows, 2 if gated else 1, widths[1])
    return matmul(portable_kernel.grouped_matmul, config, rows, gated, with_lora, widths, dtype, biases, activation)


def shrink(kernel, rows: int, pools: int, width: int, dtype: str):
    def call(x, pools, tiles, steps):
        return kernel(x, pools, tiles, steps)

    steps = steps_of(kernel, rows)
    return call, (array((1024, width), dtype), (array((100, 16, width), dtype),) * pools, tiles(rows), steps)


def transposed_matmul(config: HopperConfig, with_lora: bool, widths: tuple[int, int], dtype: str, sources: int = 1):
    """The gradient of the rows: `widths` are those of its rows and of its result."""

    def kernel(x, weights, tiles, config, unit, steps, hidden, pages, added):
        source = MatmulOperands(x, weights, steps, hidden, pages)
        return hopper_kernel.grouped_matmul((source,) * sources, tiles, config, unit, added, transposed=True)

    kernel.__module__ = hopper_kernel.__name__
    call, (x, (weight,), *others) = matmul(kernel, config, config.tile_rows, False, with_lora, widths, dtype)
    experts, out, depth = weight.shape
    return call, (x, (array((experts, depth, out), dtype),), *others)


def contraction(ranks: int, rows: int, width: int, dtype: str, several: int = 1):
    def call(hiddens, rows, runs):
        own = hopper_gradients.Runs(*runs)
        return hopper_gradients.contract(hiddens, rows, (own,) * several, (300,) * several)

    return call, ((array((ranks, rows), dtype),) * several, array((rows, width), dtype), [array((32,))] * 5)


def portable_cases():
    yield from decode_cases()
    for rows in TILE_ROWS:
        for gated in (True, False):
            for with_lora in (True, False):
                name = f"matmul {rows} gated={gated} lora={with_lora}"
                yield name, *portable_matmul(rows, gated, with_lora, (2048, 768) if gated else (768, 2048), "bfloat16")
        yield f"shrink {rows}", *shrink(portable_shrink.shrink, rows, 1, 2048, "bfloat16")
    yield "matmul float16, gpt-oss widths", *portable_matmul(64, False, True, (2880, 2880), "float16")
    for gated in (True, False):
        yield f"matmul gated={gated}, biases", *portable_matmul(64, gated, True, (2880, 2880), "bfloat16", biases=True)
    for activation in OTHER_ACTIVATIONS:
        case = portable_matmul(64, True, False, (2048, 768), "bfloat16", activation=activation)
        yield f"matmul 64 gated=True, {activation}", *case
    yield "matmul of one step of K", *portable_matmul(32, True, True, (64, 64), "bfloat16")
    yield "shrink of two pools, float16", *shrink(portable_shrink.shrink, 64, 2, 2880, "float16")


def hopper_cases():
    yield from decode_cases()
    for pairs, experts in ((64, 128), (1024, 128), (4096, 128), (16384, 128), (32768, 128), (65536, 128)):
        config = heuristic(pairs, experts)
        for gated in (True, False):
            # Without adapters a kernel is a part of the one with: one size is enough.
            for with_lora in (True, False) if pairs == 64 else (True,):
                name = f"matmul {config.tile_rows} gated={gated} lora={with_lora}"
                yield name, *hopper_matmul(config, gated, with_lora, (2048, 768) if gated else (768, 2048), "bfloat16")
    yield "matmul float16, gpt-oss widths", *hopper_matmul(heuristic(100, 8), True, True, (2880, 2880), "float16")
    for activation in OTHER_ACTIVATIONS:
        config = replace(heuristic(65536, 128), widths=())  # a gated unit is the same in narrower tiles
        case = hopper_matmul(config, True, False, (2048, 768), "bfloat16", keep=True, activation=activation)
        yield f"matmul {config.tile_rows} gated=True, {activation}", *case
    # Each other kind with short tiles and with the longest, which hold the most registers.
    for pairs in (1024, 65536):
        config = heuristic(pairs, 128)
        for with_lora in (True, False) if pairs == 1024 else (True,):
            name = f"transposed matmul {config.tile_rows} lora={with_lora}"
            yield name, *transposed_matmul(config, with_lora, (768, 2048), "bfloat16")
        yield (
            f"transposed matmul {config.tile_rows} of two",
            *transposed_matmul(config, True, (768, 2048), "bfloat16", 2),
        )
        kept = hopper_matmul(config, True, True, (2048, 768), "bfloat16", keep=True)
        yield f"matmul {config.tile_rows} that keeps its factors", *kept
        for gated in (True, False):
            name = f"matmul {config.tile_rows} gated={gated}, gpt-oss biases"
            yield name, *hopper_matmul(config, gated, True, (2880, 2880), "bfloat16", biases=True)
    yield "transposed matmul float16", *transposed_matmul(heuristic(100, 8), True, (2880, 2880), "float16")
    yield "contraction of pages", *contraction(64, 65536, 2048, "bfloat16")
    yield "contraction of pages of two", *contraction(64, 65536, 2048, "bfloat16", 2)
    yield "contraction of many pages, float16", *contraction(256, 1024, 2880, "float16")
    for form in (FP8_BLOCK, FP8_CHANNEL, MXFP4, int4(32), int4(128), int4(128, True)):
        name = f"matmul over {form.name} of {form.block[1]}"
        yield f"{name}, 8 rows", *packed_matmul(form, True, False, (2048, 768), 8, 8)
        rows = rows_per_tile(MAX_ROWS, form)
        for gated in (True, False):
            widths = (2048, 768) if gated else (768, 2048)
            yield f"{name}, {rows} rows, gated={gated}", *packed_matmul(form, gated, True, widths, 16384, rows)
    for rows in (8, 56, 176):
        yield f"shrink {rows}", *shrink(hopper_shrink.shrink, rows, 1, 2048, "bfloat16")
    yield "shrink of two pools, float16", *shrink(hopper_shrink.shrink, 16, 2, 2880, "float16")
    for slots, one_pool in ((8, True), (32, False), (256, True)):
        yield f"steps of {slots} slots", *steps(slots, one_pool)
    for slots, one_pool in ((8, True), (256, False)):
        yield f"steps of {slots} slots, few tokens", *steps(slots, one_pool, 8, 8)
    for with_lora in (True, False):
        yield f"layer of few tokens, lora={with_lora}", *layer_of_few_tokens(with_lora)
    for tokens, top_k, width in ((8, 8, 2048), (8192, 8, 2048), (100, 2, 7168), (300, 2, 192), (90, 2, 2880)):
        rows = tokens * top_k + 64
        yield (
            f"dispatch {tokens} of {width}",
            lambda x, position, gaps, rows=rows: dispatch(x, position, rows, gaps=Gaps(*gaps)),
            (array((tokens, width), "bfloat16"), array((tokens * top_k,)), (array((1,)), array((200,)))),
        )
    for tokens, experts in ((8, 128), (128, 128), (200, 256), (600, 70), (8192, 256), (16384, 8), (16400, 8)):
        yield (
            f"plan {tokens}",
            lambda e, s, experts=experts: make_plan(e, s, experts, 8, "hopper"),
            (array((tokens, 8)), array((tokens,))),
        )


def compile_and_report(lowered: jax.stages.Lowered) -> list[str]:
    """What ptxas says of the kernels; it is C++ that prints it, so the file descriptor is redirected."""
    with tempfile.TemporaryFile("w+", errors="ignore") as file:
        sys.stdout.flush()
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            lowered.compile()
        finally:
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
        return re.findall(r".*(?:spill stores|registers|C75\d\d).*", file.read())


def main() -> None:
    backend, gpu, share, *patterns = sys.argv[1:]
    part, parts = map(int, share.split("/"))
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    cases = {"hopper": hopper_cases, "portable": portable_cases}[backend]
    device = topologies.get_topology_desc(platform="cuda", target_config=target(gpu), topology="1x1x1").devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    chosen = [case for case in cases() if all(re.search(pattern, case[0]) for pattern in patterns)]
    for name, call, arguments in chosen[part - 1 :: parts]:
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
        line = {"name": name, "error": None, "ptxas": []}
        try:
            with jax.default_device(device):
                line["ptxas"] = compile_and_report(jax.jit(call).lower(*placed))
        except Exception as error:  # reported, and the other kernels still compile
            line["error"] = f"{type(error).__name__}: {error}"[:500]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
