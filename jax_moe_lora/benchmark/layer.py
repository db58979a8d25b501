"""Times the routed layer with adapters: from x, router weights and expert ids to y."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jax_moe_lora.benchmark.problem import Problem, make_problem
from jax_moe_lora.moe import routed_experts
from pallas_kernels import Implementation
from pallas_kernels.specs import ADAPTERS

PEAK_FLOPS, PEAK_BYTES = 790e12, 4.3e12  # measured on an H200: bf16 matmul, device copy
LOOP = 8  # dependent layers in one call
METHOD = (
    "smaller of (a) a jitted loop of dependent layers, the expert ids shifted each time, and (b) many dispatches then "
    "one block; per layer, median of the repeats"
)


def floor_us(problem: Problem) -> float:
    """What the measured ceilings allow: weights and pages that are hit read once, or the multiplications."""
    return max(problem.moved_bytes() / PEAK_BYTES, problem.flops() / PEAK_FLOPS) * 1e6


def run_layer(problem: Problem, implementation: Implementation | None) -> Callable[..., Array]:
    """`f(x, weights, chosen, slots, experts, adapters) -> y`, for jit."""

    def layer(x, weights, chosen, slots, experts, adapters):
        return routed_experts(x, weights, chosen, experts, problem.config, adapters, slots, implementation)

    return layer


def measure(problem: Problem, implementation: Implementation | None, repeats: int = 20) -> dict[str, Any]:
    """Microseconds a layer, their spread, seconds of compilation, and the relative error of the first tokens."""
    layer = run_layer(problem, implementation)
    arguments = (problem.x, problem.weights, problem.chosen, problem.slots, problem.experts, problem.adapters)
    began = time.perf_counter()
    single = jax.jit(layer).lower(*arguments).compile()
    compile_s = time.perf_counter() - began
    y = np.asarray(single(*arguments)[:16].astype(jnp.float32))
    expected = problem.expected(min(16, problem.x.shape[0]))
    error = float(np.linalg.norm(y - expected) / np.linalg.norm(expected))

    @jax.jit
    def loop(x, weights, chosen, slots, experts, adapters):
        def step(i, carry):
            # Other experts each time, so that the L2 does not answer; the last result, so that nothing is hoisted.
            shifted = lax.rem(chosen + i * 37, jnp.int32(problem.config.num_experts))
            y = layer(carry, weights, shifted, slots, experts, adapters)
            return carry + y * jnp.asarray(1e-3, y.dtype)

        return lax.fori_loop(0, LOOP, step, x)

    looped = [t / LOOP for t in _times(partial(loop, *arguments), repeats)]

    def dispatches():
        for _ in range(LOOP - 1):
            single(*arguments)
        return single(*arguments)

    queued = [t / LOOP for t in _times(dispatches, repeats)]
    best = min((looped, queued), key=statistics.median)
    return {
        "layer_us": round(statistics.median(best) * 1e6, 1),
        "min_us": round(min(best) * 1e6, 1),
        "max_us": round(max(best) * 1e6, 1),
        "loop_us": round(statistics.median(looped) * 1e6, 1),
        "queue_us": round(statistics.median(queued) * 1e6, 1),
        "floor_us": round(floor_us(problem), 1),
        "compile_s": round(compile_s, 2),
        "rel_err": float(f"{error:.4g}"),
    }


def _times(call: Callable[[], Any], repeats: int) -> list[float]:
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return times


def sweep(
    shapes: list[str],
    adapters: list[str],
    tokens: list[int],
    routing: str,
    implementation: Implementation | None,
    repeats: int,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Measures every combination and hands each row to `report` as it comes."""
    for shape in shapes:
        for name in adapters:
            problem = make_problem(shape, name)
            for count in tokens:
                drawn = problem.with_tokens(count, routing, ADAPTERS[name])
                row = {"shape": shape, "tokens": count, "adapters": name, "engine": "jax_moe_lora", "routing": routing}
                report(row | measure(drawn, implementation, repeats))
                del drawn
            problem = replace(problem, adapters=None)
