"""Times a routed layer with adapters: from x, router weights and expert ids to y."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jax_moe_lora.benchmark.ceilings import Ceilings
from jax_moe_lora.benchmark.oracle import relative_error
from jax_moe_lora.benchmark.problem import Problem
from jax_moe_lora.layer.moe import routed_experts
from pallas_kernels.ops import Implementation

LAYERS_A_CALL = 8
WRONG = 2e-2  # relative error of a wrong result; bfloat16, and peers that round more often, stay below 1e-2
MOST_CALLS, ENOUGH_S = 1024, 60e-3  # calls are queued until they take this long: of 10 ms, starting and waiting counts
Method = Literal["both", "loop", "queue"]
ResultRow = dict[str, Any]
"""The figures of one cell by their names, or `error`: a row of the tables that a benchmark writes."""
MeasureRow = Callable[[int], ResultRow]
"""Is given the number of repeats, measures, and returns the figures."""
Layer = Callable[..., Array]
"""`f(x, weights, chosen, slots, experts, adapters) -> y`; adapters are `LayerPages`, or None."""
METHOD = (
    f"loop: calls of a jitted, unrolled loop of {LAYERS_A_CALL} dependent layers; queue: {LAYERS_A_CALL} dispatches of "
    "a jitted layer, in turn; both: the smaller. Expert ids are shifted for each layer, so that the L2 does not "
    f"answer. Calls of {ENOUGH_S * 1e3:g} ms, {MOST_CALLS} at most, are queued before one block. Per layer, median of "
    "the repeats. rel_err: of the loop's last layer, or of the queue's layer once. compile_s: trace to executable, "
    "beside others. The ceilings were measured before"
)


def floor_us(problem: Problem, ceilings: Ceilings) -> float:
    """The least time that the ceilings allow for one layer.

    That is reading the weights and pages in use once, or the multiplications, whichever takes longer.

    Args:
      problem: the layer's inputs.
      ceilings: the device's limits.

    Returns:
      Microseconds.
    """
    return max(problem.moved_bytes() / ceilings.bytes_per_s, problem.flops() / ceilings.flop_per_s) * 1e6


def library_layer(problem: Problem, implementation: Implementation | None) -> Layer:
    """The library's layer, as a function that `compile_layer` takes.

    Args:
      problem: the layer's inputs.
      implementation: a backend by name; None picks the best one.

    Returns:
      The function.
    """

    def layer(x, weights, chosen, slots, experts, adapters):
        return routed_experts(x, weights, chosen, experts, problem.config, adapters, slots, implementation)

    return layer


def shifted(chosen: Array, nth: Any, num_experts: int) -> Array:
    """Expert ids for the nth of the dependent layers: different ones for each, so that no cache has their weights."""
    return (chosen + nth * 37) % num_experts


def compile_layer(problem: Problem, layer: Layer, method: Method = "both", experts: Any = None) -> MeasureRow:
    """Compiles a layer for timing. May be called from any thread.

    Args:
      problem: the layer's inputs.
      layer: the function to time.
      method: which programs to compile and time, see `METHOD`.
      experts: the weights in the layout that `layer` takes; None passes those of the problem.

    Returns:
      A function that is given the number of repeats, measures, and returns the figures of one row.
    """
    weights = problem.experts if experts is None else experts
    arguments = (problem.x, problem.weights, problem.chosen, problem.slots, weights, problem.adapters)
    one = jax.jit(layer)  # traced once for both programs
    num_experts = problem.config.num_experts

    def loop(x, weights, chosen, slots, experts, adapters):
        def step(i, carry):
            x, y = carry
            x = x + y * jnp.asarray(1e-3, y.dtype)  # reads the last result, so that nothing is hoisted or dropped
            return x, one(x, weights, shifted(chosen, i, num_experts), slots, experts, adapters)

        return lax.fori_loop(0, LAYERS_A_CALL, step, (x, jnp.zeros_like(x)), unroll=True)  # like a model's layers

    programs, seconds = {}, 0.0
    for name, function in (("loop", jax.jit(loop)), ("queue", one)):
        if method in (name, "both"):
            began = time.perf_counter()
            programs[name] = function.lower(*arguments).compile()
            seconds = time.perf_counter() - began
    return lambda repeats: _measure(problem, programs, arguments, repeats) | {"compile_s": round(seconds, 2)}


def _measure(problem: Problem, programs: dict[str, Any], arguments: tuple[Any, ...], repeats: int) -> ResultRow:
    """Checks the results of the compiled programs, then times them."""
    x, weights, chosen, *rest = arguments
    ids = [shifted(chosen, i, problem.config.num_experts) for i in range(LAYERS_A_CALL)]
    calls: dict[str, Callable[[], Any]] = {}
    errors = []
    if "queue" in programs:
        y = programs["queue"](*arguments)
        errors.append(relative_error(y, problem))
        calls["queue"] = lambda: [programs["queue"](x, weights, each, *rest) for each in ids]
    if "loop" in programs:
        last_x, y = programs["loop"](*arguments)  # y is the layer of last_x with the last ids
        errors.append(relative_error(y, replace(problem, x=last_x, chosen=ids[-1])))
        calls["loop"] = lambda: programs["loop"](*arguments)
    timed = {name: timings(call, jax.block_until_ready, repeats) for name, call in calls.items()}
    return figures(problem, timed, float(np.max(errors)))


def figures(problem: Problem, timed: dict[str, list[float]], error: float) -> ResultRow:
    """The figures of one row; the method with the smaller median counts.

    Args:
      problem: the layer's inputs.
      timed: method -> seconds per layer of each repeat.
      error: relative error of the result.

    Returns:
      Microseconds per layer of each method, of the better method, and their spread, and the error.

    Raises:
      ValueError: the error is that of a wrong result, or not a number.
    """
    if not error <= WRONG:
        raise ValueError(f"the result is wrong: relative error {error:.4g}")
    best = min(timed.values(), key=statistics.median)
    by_method = {f"{name}_us": round(statistics.median(times) * 1e6, 1) for name, times in timed.items()}
    return by_method | {
        "layer_us": round(statistics.median(best) * 1e6, 1),
        "rel_err": float(f"{error:.4g}"),
        "min_us": round(min(best) * 1e6, 1),
        "max_us": round(max(best) * 1e6, 1),
    }


def timings(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> list[float]:
    """Times a call again and again.

    Args:
      call: starts `LAYERS_A_CALL` layers.
      wait: waits for what `call` returned.
      repeats: number of timings.

    Returns:
      Seconds per layer of each repeat.
    """
    wait(call())
    began = time.perf_counter()
    wait(call())
    together = min(max(math.ceil(ENOUGH_S / (time.perf_counter() - began)), 1), MOST_CALLS)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        wait([call() for _ in range(together)])
        times.append((time.perf_counter() - began) / together / LAYERS_A_CALL)
    return times
