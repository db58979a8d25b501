"""Times the routed layer with adapters: from x, router weights and expert ids to y."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jax_moe_lora.benchmark.problem import Pooled, Problem, make_problem
from jax_moe_lora.moe import routed_experts
from pallas_kernels import Implementation
from pallas_kernels.specs import ADAPTERS

PEAK_FLOPS, PEAK_BYTES = 790e12, 4.3e12  # measured on an H200: bf16 matmul, device copy
LOOP = 8  # dependent layers in one call
CHECKED_TOKENS = 4  # tokens that are compared with the oracle
METHOD = (
    "smaller of (a) a jitted loop of dependent layers and (b) as many dispatches then one block, the expert ids "
    "shifted each time; per layer, median of the repeats; compile_s beside up to seven other compilations"
)


def floor_us(problem: Problem) -> float:
    """What the measured ceilings allow: weights and pages that are hit read once, or the multiplications."""
    return max(problem.moved_bytes() / PEAK_BYTES, problem.flops() / PEAK_FLOPS) * 1e6


def run_layer(problem: Problem, implementation: Implementation | None) -> Callable[..., Array]:
    """`f(x, weights, chosen, slots, experts, adapters) -> y`, for jit; adapters are `Pooled`, or None."""

    def layer(x, weights, chosen, slots, experts, adapters):
        own = None if adapters is None else adapters.layer()
        return routed_experts(x, weights, chosen, experts, problem.config, own, slots, implementation)

    return layer


@dataclass(frozen=True)
class Programs:
    """One compiled call, and a compiled loop of dependent ones. `arguments` are theirs."""

    problem: Problem
    arguments: tuple[Any, ...]
    single: Callable[..., Array]
    loop: Callable[..., Array] | None
    compile_s: float


def compile_layer(problem: Problem, implementation: Implementation | None, with_loop: bool) -> Programs:
    """Compiles the programs; may run in a thread of its own."""
    layer = run_layer(problem, implementation)
    adapters = None if problem.adapters is None else Pooled.of(problem.adapters)
    arguments = (problem.x, problem.weights, problem.chosen, problem.slots, problem.experts, adapters)

    def loop(x, weights, chosen, slots, experts, adapters):
        def step(i, carry):
            # Other experts each time, so that the L2 does not answer; the last result, so that nothing is hoisted.
            shifted = lax.rem(chosen + i * 37, jnp.int32(problem.config.num_experts))
            y = layer(carry, weights, shifted, slots, experts, adapters)
            return carry + y * jnp.asarray(1e-3, y.dtype)

        return lax.fori_loop(0, LOOP, step, x)

    looped = jax.jit(loop).lower(*arguments).compile() if with_loop else None
    began = time.perf_counter()
    single = jax.jit(layer).lower(*arguments).compile()
    return Programs(problem, arguments, single, looped, time.perf_counter() - began)


def measure(programs: Programs, repeats: int) -> dict[str, Any]:
    """Microseconds a layer, their spread, seconds of compilation, and the relative error of the first tokens."""
    problem, arguments = programs.problem, programs.arguments
    checked = min(CHECKED_TOKENS, problem.x.shape[0])
    y = np.asarray(programs.single(*arguments)[:checked].astype(jnp.float32))
    expected = problem.expected(checked)

    x, weights, chosen, *rest = arguments
    others = [(chosen + i * 37) % problem.config.num_experts for i in range(LOOP)]  # as in the loop

    def dispatches():
        return [programs.single(x, weights, ids, *rest) for ids in others]

    queued = [t / LOOP for t in _times(dispatches, repeats)]
    best, loop = queued, programs.loop
    figures = {"queue_us": round(statistics.median(queued) * 1e6, 1)}
    if loop is not None:
        looped = [t / LOOP for t in _times(lambda: loop(*arguments), repeats)]
        figures["loop_us"] = round(statistics.median(looped) * 1e6, 1)
        best = min((looped, queued), key=statistics.median)
    return figures | {
        "layer_us": round(statistics.median(best) * 1e6, 1),
        "floor_us": round(floor_us(problem), 1),
        "rel_err": float(f"{np.linalg.norm(y - expected) / np.linalg.norm(expected):.4g}"),
        "min_us": round(min(best) * 1e6, 1),
        "max_us": round(max(best) * 1e6, 1),
        "compile_s": round(programs.compile_s, 2),
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
    shapes: Sequence[str],
    adapters: Sequence[str],
    tokens: Sequence[int],
    routing: str = "uniform",
    implementation: Implementation | None = None,
    repeats: int = 20,
    with_loop: bool = True,
) -> Iterator[dict[str, Any]]:
    """Measures every combination, a row each. The token counts of one problem are compiled side by side."""
    for shape in shapes:
        for name in adapters:
            problem = make_problem(shape, name)
            drawn = [problem.with_tokens(count, routing, ADAPTERS[name]) for count in tokens]
            with ThreadPoolExecutor(max_workers=8) as pool:
                compiled = list(pool.map(lambda one: compile_layer(one, implementation, with_loop), drawn))
            for count, programs in zip(tokens, compiled, strict=True):
                cell = {"shape": shape, "tokens": count, "adapters": name, "engine": "jax_moe_lora"}
                yield cell | measure(programs, repeats) | {"routing": routing}
