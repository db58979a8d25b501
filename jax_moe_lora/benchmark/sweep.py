"""Measures every combination of shape, adapters, tokens and engine: a row for each, failures included."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from jax_moe_lora.benchmark.ceilings import Ceilings, measure_ceilings
from jax_moe_lora.benchmark.layer import MeasureRow, Method, ResultRow, compile_layer, floor_us, library_layer
from jax_moe_lora.benchmark.problem import Problem, make_problem
from jax_moe_lora.benchmark.quantised import check_schemes, quantised
from jax_moe_lora.files.locks import locked_folder
from pallas_kernels.ops import ExpertWeights, Implementation
from pallas_kernels.specs import ADAPTERS

THREADS = min(8, os.cpu_count() or 1)  # compilations in parallel


class Engine(Protocol):
    """Something whose layer is timed."""

    @property
    def name(self) -> str:
        """The name in the results."""

    def why_not(self, adapters: str) -> str:
        """Why it cannot run cells with this set of adapters; empty if it can."""

    def prepare(self, problem: Problem, method: Method) -> MeasureRow:
        """Compiles; the result is given the number of repeats and measures."""


@dataclass(frozen=True)
class ThisLibrary:
    """This library.

    Attributes:
      implementation: a backend by name; None picks the best one.
      scheme: what the weights are quantised to, a name in `quantised.schemes.SCHEMES`; None for 16 bits.
    """

    implementation: Implementation | None = None
    scheme: str | None = None

    @property
    def name(self) -> str:
        """A backend asked for by name counts as an engine of its own, and so does a format of weights."""
        backend = "jax_moe_lora" if self.implementation is None else f"jax_moe_lora[{self.implementation}]"
        return backend if self.scheme is None else f"{backend}/{self.scheme}"

    def why_not(self, adapters: str) -> str:
        return ""

    def prepare(self, problem: Problem, method: Method) -> MeasureRow:
        return compile_layer(problem, library_layer(problem, self.implementation), method)


@dataclass(frozen=True)
class Cells:
    """What a sweep covers: every combination of shape, adapters and tokens.

    Attributes:
      shapes: layers in `specs.LAYERS`.
      adapters: sets of adapters in `specs.ADAPTERS`.
      tokens: numbers of tokens.
      routing: how experts are drawn, see `problem.choose_experts`.
      slots: how slots are drawn, see `problem.choose_slots`.
    """

    shapes: Sequence[str]
    adapters: Sequence[str]
    tokens: Sequence[int]
    routing: str = "uniform"
    slots: str = "uniform"


def sweep(
    cells: Cells,
    engines: Sequence[Engine],
    repeats: int = 20,
    method: Method = "both",
    turns: Path | None = None,
    ceilings: Callable[[], Ceilings] = measure_ceilings,
) -> Iterator[ResultRow]:
    """Measures all cells with all engines. The cells of one shape are compiled in parallel, then measured one by one.

    Args:
      cells: what to measure.
      engines: whose layers to measure.
      repeats: timings, of which the median counts.
      method: how to time, see `layer.METHOD`.
      turns: a folder; sweeps with the same folder take turns on the device, and the caller handles what they yield in
        its turn too. One sweep may compile while another measures. That slows loops over a few tokens, which wait for
        the host, if all processors compile (82 us instead of 41 for one token on an H200).
      ceilings: returns the ceilings of the floors; called when it is this sweep's turn to measure.

    Yields:
      A row per cell and engine; if one fails, its row has `error` instead of figures, and the sweep goes on.
    """
    check_schemes(cells.shapes, list(_schemes(engines).values()))
    for shape in cells.shapes:
        with in_turn(turns):
            base = make_problem(shape)
            weights: dict[Engine, ExpertWeights | Exception] = {
                engine: _quantised(base, engine, scheme) for engine, scheme in _schemes(engines).items()
            }
        with ThreadPoolExecutor(THREADS) as pool:
            started: list[tuple[ResultRow, Callable[[Ceilings], float], Future[MeasureRow]]] = []
            for name in cells.adapters:
                with in_turn(turns):
                    problem = base.with_adapters(name)
                    jax.block_until_ready(problem.adapters)
                for count in cells.tokens:
                    drawn = problem.with_tokens(count, cells.routing, ADAPTERS[name], cells.slots)
                    for engine in engines:
                        if not engine.why_not(name):
                            cell = {"shape": shape, "tokens": count, "adapters": name, "engine": engine.name}
                            cell |= {"routing": cells.routing, "slots": cells.slots}
                            cell |= {"hit_experts": len(np.unique(drawn.chosen)), "draw": drawn.draw.digest}
                            experts = weights.get(engine, drawn.experts)
                            if isinstance(experts, Exception):
                                started.append((cell, partial(floor_us, drawn), pool.submit(_fail, experts)))
                                continue
                            given = replace(drawn, experts=experts)
                            started.append((cell, partial(floor_us, given), pool.submit(engine.prepare, given, method)))
            pool.shutdown(wait=True)  # a compilation during a measurement would slow it
            started.reverse()
            with in_turn(turns):
                limits = ceilings()
                while started:
                    cell, floor, future = started.pop()  # which frees what it holds once it is measured
                    cell |= {"floor_us": round(floor(limits), 1)}
                    yield cell | _guarded(future, repeats)


def _schemes(engines: Sequence[Engine]) -> dict[ThisLibrary, str]:
    """Those whose weights are quantised, and to what."""
    ours = [engine for engine in engines if isinstance(engine, ThisLibrary)]
    return {engine: engine.scheme for engine in ours if engine.scheme is not None}


def _quantised(base: Problem, engine: ThisLibrary, scheme: str) -> ExpertWeights | Exception:
    """A layer's weights as the engine takes them, or why there are none, such as too little memory."""
    try:
        return jax.block_until_ready(quantised(base.experts, scheme, engine.implementation, base.x.dtype))
    except Exception as error:
        return error


def _fail(error: Exception) -> MeasureRow:
    raise error


@contextmanager
def in_turn(folder: Path | None) -> Iterator[None]:
    """Waits until no other process or thread is in here with the same folder; None does not wait."""
    with locked_folder(folder, wait=True) if folder else nullcontext():
        yield


def _guarded(future: "Future[MeasureRow]", repeats: int) -> ResultRow:
    try:
        return future.result()(repeats)
    except Exception as error:  # whatever the compiler, the device or a peer raises: go on with the other cells
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
