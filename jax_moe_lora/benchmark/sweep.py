"""Measures every combination of shape, adapters, tokens and engine, a row each; what fails is a row too."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax

from jax_moe_lora.benchmark.ceilings import Ceilings, measure_ceilings
from jax_moe_lora.benchmark.layer import Method, compile_layer, floor_us, own_layer
from jax_moe_lora.benchmark.problem import Problem, make_problem
from jax_moe_lora.files.locks import locked_folder
from pallas_kernels.ops import Implementation
from pallas_kernels.specs import ADAPTERS

THREADS = min(8, os.cpu_count() or 1)  # compilers beside each other
Measure = Callable[[int], dict[str, Any]]


class Engine(Protocol):
    """Something whose layer is timed."""

    @property
    def name(self) -> str: ...

    def why_not(self, adapters: str) -> str:
        """Empty where it can run cells with these adapters."""

    def prepare(self, problem: Problem, method: Method) -> Measure:
        """Compiles; the result measures, given the repeats."""


@dataclass(frozen=True)
class Ours:
    """The library, with the backend of this name or the best one."""

    implementation: Implementation | None = None

    @property
    def name(self) -> str:
        """Rows of a backend that was asked for are another engine's than those of the best one."""
        return "jax_moe_lora" if self.implementation is None else f"jax_moe_lora[{self.implementation}]"

    def why_not(self, adapters: str) -> str:
        return ""

    def prepare(self, problem: Problem, method: Method) -> Measure:
        return compile_layer(problem, own_layer(problem, self.implementation), method)


@dataclass(frozen=True)
class Cells:
    """What a sweep covers. `routing` and `slots`: how experts and slots are drawn, see `problem.py`."""

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
) -> Iterator[dict[str, Any]]:
    """Yields a row a cell and engine. All cells of one shape are compiled side by side, then measured one by one.

    A cell that raises gives a row with `error` in place of figures, and the sweep goes on.

    Args:
      turns: a folder; sweeps with the same one take turns on the device, and what they yield is done with in turn too.
        They compile beside each other's measurements: of loops of a few tokens, which wait for the host, that shows
        where all processors compile (82 us in place of 41 for one token on an H200).
      ceilings: gives those of the floors; asked for when it is the turn to measure.
    """
    for shape in cells.shapes:
        with in_turn(turns):
            base = make_problem(shape)
            jax.block_until_ready((base.x, base.experts))
        with ThreadPoolExecutor(THREADS) as pool:
            started: list[tuple[dict[str, Any], Callable[[Ceilings], float], Future[Measure]]] = []
            for name in cells.adapters:
                with in_turn(turns):
                    problem = base.with_adapters(name)
                    jax.block_until_ready(problem.adapters)
                for count in cells.tokens:
                    drawn = problem.with_tokens(count, cells.routing, ADAPTERS[name], cells.slots)
                    for engine in engines:
                        if not engine.why_not(name):
                            cell = {"shape": shape, "tokens": count, "adapters": name, "engine": engine.name}
                            started.append((cell, partial(floor_us, drawn), pool.submit(engine.prepare, drawn, method)))
            pool.shutdown(wait=True)  # this run's compilers, beside its measurements, would show in them
            started.reverse()
            with in_turn(turns):
                limits = ceilings()
                while started:
                    cell, floor, future = started.pop()  # and what they hold is let go of
                    cell |= {"floor_us": round(floor(limits), 1)}
                    yield cell | _guarded(future, repeats) | {"routing": cells.routing, "slots": cells.slots}


@contextmanager
def in_turn(folder: Path | None) -> Iterator[None]:
    """Waits until no other process or thread is in here with this folder; None is no wait."""
    with locked_folder(folder, wait=True) if folder else nullcontext():
        yield


def _guarded(future: "Future[Measure]", repeats: int) -> dict[str, Any]:
    try:
        return future.result()(repeats)
    except Exception as error:  # of a compiler, a device or a peer: whatever it is, the other cells are worth having
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
