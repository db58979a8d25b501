"""Times expressions of the grouped matmul: `python -m pallas_kernels.grouped_matmul.bench --out results.json`.

Each is a jitted loop of dependent calls on random data, with uniform routing; the median over repeats, a call. On a CPU
only the ratios within one run mean something.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.plan.api import RoutingPlan, make_plan
from pallas_kernels.specs import LAYERS, MoEShape
from pallas_kernels.xla.dot import matmul_t

Expression = Callable[[Array, Array, RoutingPlan], Array]


def tile_loop(x: Float[Array, "P in"], weights: Float[Array, "E out in"], plan: RoutingPlan) -> Float[Array, "P out"]:
    """What the XLA backend does: a loop over the tiles in use."""
    return grouped_matmul(x, weights, plan, implementation="xla")


def ragged_dot(x: Float[Array, "P in"], weights: Float[Array, "E out in"], plan: RoutingPlan) -> Float[Array, "P out"]:
    """`jax.lax.ragged_dot`."""
    return lax.ragged_dot(
        x,
        weights.swapaxes(1, 2),
        plan.group_sizes,
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def gathered_tiles(
    x: Float[Array, "P in"], weights: Float[Array, "E out in"], plan: RoutingPlan
) -> Float[Array, "P out"]:
    """All tiles at once, each with its own copy of its expert's weight, as one batched matmul."""
    tiles = plan.tiles
    rows = jnp.minimum(tiles.start[:, None] + jnp.arange(tiles.size)[None, :], x.shape[0] - 1)
    products = jax.vmap(matmul_t)(x[rows], weights[tiles.expert])
    in_tile = jnp.arange(tiles.size)[None, :] < tiles.rows[:, None]
    target = jnp.where(in_tile, rows, x.shape[0])
    return jnp.zeros((x.shape[0], weights.shape[1]), jnp.float32).at[target].set(products, mode="drop")


EXPRESSIONS: dict[str, Expression] = {
    "tile_loop": tile_loop,
    "gathered_tiles": gathered_tiles,
    "ragged_dot": ragged_dot,
}


def measure(expression: Expression, spec: MoEShape, tokens: int, dtype: str, repeats: int) -> dict[str, float]:
    """Microseconds of the gate projection of one layer, and its compile time in seconds."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows = tokens * spec.top_k
    x = jax.random.normal(keys[0], (rows, spec.hidden_size), dtype)
    weights = jax.random.normal(keys[1], (spec.num_experts, spec.expert_width, spec.hidden_size), dtype) * 0.02
    chosen = lax.top_k(jax.random.normal(keys[2], (tokens, spec.num_experts)), spec.top_k)[1]
    plan = make_plan(chosen, jnp.full(tokens, -1), spec.num_experts, 0, "xla")
    calls = 4

    @jax.jit
    def loop(x: Array, weights: Array, plan: RoutingPlan) -> Array:
        def call(_: int, carry: Array) -> Array:
            # Each call reads a little of the last one's result, so that none is hoisted out or dropped.
            y = expression(carry, weights, plan)
            return carry + (y.mean() * 1e-6).astype(carry.dtype)

        return lax.fori_loop(0, calls, call, x)

    began = time.perf_counter()
    jax.block_until_ready(loop(x, weights, plan))
    first = time.perf_counter() - began
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(loop(x, weights, plan))
        times.append((time.perf_counter() - began) / calls * 1e6)
    return {"us": round(statistics.median(times), 1), "min_us": round(min(times), 1), "first_call_s": round(first, 2)}


def write_report(out: Path, method: str, rows: list[dict[str, Any]]) -> None:
    """Writes measurements as JSON, with where and when they were taken.

    Args:
      out: the file; its folder is made.
      method: how the rows were measured.
      rows: the measurements.
    """
    device = jax.devices()[0].device_kind
    report = {
        "device": f"{platform.machine()} CPU" if device == "cpu" else device,
        "date": date.today().isoformat(),
        "jax": jax.__version__,
        "method": method,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-tiny"], choices=LAYERS)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--expressions", nargs="+", default=list(EXPRESSIONS), choices=EXPRESSIONS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shape in args.shapes:
        for tokens in args.tokens:
            for name in args.expressions:
                figures = measure(EXPRESSIONS[name], LAYERS[shape], tokens, args.dtype, args.repeats)
                rows.append({"shape": shape, "tokens": tokens, "expression": name, "dtype": args.dtype} | figures)
                print(rows[-1], flush=True)
    if args.out:
        write_report(
            args.out, "jitted loop of 4 dependent calls, median of repeats, uniform routing, random data", rows
        )


if __name__ == "__main__":
    main()
