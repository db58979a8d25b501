"""Finds configs of the Hopper kernels that beat the heuristic, and writes them to a tuned file (`tuning.py`).

A cell is a shape and a number of tokens. Its layer is timed with many candidates: first with different rows per tile,
which the plan and both matmuls share, then with different stages and warpgroups of each matmul. A config must not
depend on adapters, so a candidate's score is the geometric mean over several sets of adapters, relative to the
heuristic.

Weights are bfloat16. Quantised ones run through XLA, which reads no tuned file: their layers have nothing to tune.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jax_moe_lora.benchmark.layer import METHOD, MeasureRow, compile_layer
from jax_moe_lora.benchmark.problem import Problem, make_problem
from jax_moe_lora.benchmark.report import about
from jax_moe_lora.benchmark.sweep import THREADS
from jax_moe_lora.devices import require_device
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.folders import whole_file, writing_to
from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.hopper import tuned_file
from pallas_kernels.hopper.tuning import HopperConfig, MatmulShape, bucket, deepest, heuristic, why_not
from pallas_kernels.ops import choose, combine, make_lora_steps, make_plan
from pallas_kernels.pages import NO_ADAPTERS
from pallas_kernels.quantised.api import dense
from pallas_kernels.specs import ADAPTERS, LAYERS

# Rows per tile that are tried, if near the heuristic's.
LADDER = (8, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 144, 176, 192)
LEAST_GAIN = 0.02  # to become an entry; timings of the same program differ by about 1 %
LARGEST_ERROR = 1e-2  # relative, of bfloat16 against the float32 oracle
Log = Callable[[str], Any]


@dataclass(frozen=True)
class Candidate:
    """The configs of a layer's two matmuls, which have the same `tile_rows`."""

    gate_up: HopperConfig
    down: HopperConfig

    def __str__(self) -> str:
        """Rows per tile, stages and warpgroups of each: `24 x 6 x 2, 24 x 5 x 2`."""
        return ", ".join(f"{c.tile_rows} x {c.stages} x {c.warpgroups}" for c in (self.gate_up, self.down))


def run_candidate(candidate: Candidate, x, weights, chosen, slots, experts, adapters):
    """The layer of `moe.routed_experts`, cut in this way."""
    pages = NO_ADAPTERS if adapters is None else adapters
    rows = candidate.gate_up.tile_rows
    plan = make_plan(chosen, slots, experts.gate.shape[0], pages.num_slots, "hopper", rows)
    gate_up, down = pages.select("gate", "up"), pages.select("down")
    steps_in, steps_out = make_lora_steps(plan, (gate_up, down))
    both = (experts.gate, experts.up)
    gated = hopper.grouped_matmul(
        x,
        both,
        plan,
        of_tokens=True,
        biases=(None, None),
        adapters=gate_up,
        steps=steps_in,
        activation="silu",
        config=candidate.gate_up,
    )
    rows_of_down = hopper.grouped_matmul(
        gated,
        (experts.down,),
        plan,
        of_tokens=False,
        biases=(None,),
        adapters=down,
        steps=steps_out,
        activation="silu",
        config=candidate.down,
    )
    return combine(rows_of_down, weights, plan).astype(x.dtype)


def tile_candidates(pairs: int, num_experts: int) -> list[Candidate]:
    """The heuristic's candidate, then those with fewer and with more rows per tile."""
    first = heuristic(pairs, num_experts)
    near = [rows for rows in LADDER if first.tile_rows / 2 <= rows <= first.tile_rows * 2]
    configs = [first, *(heuristic(pairs, num_experts, rows) for rows in near)]
    return [Candidate(config, config) for config in dict.fromkeys(configs)]


def matmul_candidates(best: Candidate) -> list[Candidate]:
    """Candidates in which one matmul of `best` has fewer stages or the other number of warpgroups."""
    candidates = []
    for name in ("gate_up", "down"):
        config: HopperConfig = getattr(best, name)
        configs = [replace(config, stages=config.stages - fewer) for fewer in (1, 2)]
        configs.append(replace(deepest(config.tile_rows, 3 - config.warpgroups), widths=config.widths))
        candidates += [replace(best, **{name: other}) for other in configs if not why_not(other)]
    return candidates


class CandidateTimer:
    """Times candidates on the problems of one cell.

    Attributes:
      problems: the cell's layer, with each set of adapters.
      repeats: timings, of which the median counts.
      log: is given a sentence about each candidate.
      times: candidate -> microseconds per layer, for each problem.
    """

    def __init__(self, problems: Sequence[Problem], repeats: int, log: Log) -> None:
        self.problems, self.repeats, self.log = problems, repeats, log
        self.times: dict[Candidate, list[float]] = {}
        self._measures: dict[Candidate, list[MeasureRow]] = {}

    def try_all(self, candidates: Sequence[Candidate]) -> None:
        """Compiles candidates in parallel and times them one by one; reports and drops those that fail or are wrong."""
        new = [candidate for candidate in candidates if candidate not in self.times]
        with ThreadPoolExecutor(THREADS) as pool:
            started = {c: [pool.submit(self._compile, c, problem) for problem in self.problems] for c in new}
        for candidate, futures in started.items():
            try:
                self._measures[candidate] = [future.result() for future in futures]
                self.times[candidate] = self._time(candidate)
            except Exception as error:  # whatever is raised: go on with the other candidates
                self.log(f"{candidate}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            else:
                self.log(f"{candidate}: {self.times[candidate]} us")

    def again(self, candidate: Candidate) -> None:
        """Times a candidate once more and keeps the smaller times."""
        self.times[candidate] = list(map(min, self.times[candidate], self._time(candidate)))

    def score(self, candidate: Candidate, against: Candidate) -> float:
        """Geometric mean of the times divided by those of `against`; below 1 is faster."""
        ratios = [a / b for a, b in zip(self.times[candidate], self.times[against], strict=True)]
        return math.prod(ratios) ** (1 / len(ratios))

    def _compile(self, candidate: Candidate, problem: Problem) -> MeasureRow:
        return compile_layer(problem, partial(run_candidate, candidate), "loop")

    def _time(self, candidate: Candidate) -> list[float]:
        times = []
        for measure in self._measures[candidate]:
            row = measure(self.repeats)
            if not row["rel_err"] <= LARGEST_ERROR:
                raise ValueError(f"its result is wrong: relative error {row['rel_err']}")
            times.append(row["layer_us"])
        return times


def best_of(timer: CandidateTimer, pairs: int, num_experts: int, tiles_only: bool) -> Candidate:
    """The fastest candidate of a cell.

    Args:
      timer: times candidates on the cell's problems.
      pairs: routed rows, tokens times top-k.
      num_experts: E.
      tiles_only: try only different rows per tile.

    Returns:
      The candidate; the heuristic's unless another one is faster by more than the noise.

    Raises:
      InputError: the heuristic's candidate failed.
    """
    tiles = tile_candidates(pairs, num_experts)
    first = tiles[0]
    timer.try_all(tiles)
    if first not in timer.times:
        raise InputError("The heuristic's own config failed, so there is nothing to compare with; see above.")
    best = min(timer.times, key=lambda candidate: timer.score(candidate, first))
    if not tiles_only:
        timer.try_all(some := matmul_candidates(best))
        faster = dict.fromkeys(("gate_up", "down"), best)
        for candidate in (c for c in some if c in timer.times):
            name = "gate_up" if candidate.gate_up != best.gate_up else "down"
            if timer.score(candidate, faster[name]) < 1:
                faster[name] = candidate
        timer.try_all([both := Candidate(faster["gate_up"].gate_up, faster["down"].down)])
        best = min((c for c in (best, both, *some) if c in timer.times), key=lambda c: timer.score(c, first))
    for candidate in (first, best) * 2:  # again, in turn: the fastest of many was also lucky
        timer.again(candidate)
    return best if timer.score(best, first) < 1 - LEAST_GAIN else first


def tune(
    shapes: Sequence[str],
    tokens: Sequence[int],
    adapters: Sequence[str],
    repeats: int,
    tiles_only: bool,
    out: Path,
    command: str,
    log: Log,
) -> Iterator[dict[str, Any]]:
    """Tunes every cell and writes the tuned file after each; entries of other cells stay in it.

    Cells with the same numbers of experts and pairs share the rows per tile: the last one tuned decides, and matmul
    entries of the others, made for other rows, are not used.

    Args:
      shapes: layers in `specs.LAYERS`.
      tokens: numbers of tokens.
      adapters: sets of adapters in `specs.ADAPTERS`, which all count alike.
      repeats: timings, of which the median counts.
      tiles_only: try only different rows per tile.
      out: the tuned file.
      command: the command that was run, for the file.
      log: is given a sentence about each candidate.

    Yields:
      A row per cell: the best candidate, its gain, and its times beside the heuristic's.

    Raises:
      InputError: no Hopper GPU, an unknown name, a number of pairs that is not a power of two, or an `out` that was
        tuned on another device.
    """
    require_device()
    if why := choose().why_not.get("hopper"):
        raise InputError(f"tune times the Hopper kernels and cannot here: {why}.")
    check_cells(shapes, tokens, adapters)
    content = read_or_new(out, command)
    for shape in shapes:
        base, spec = make_problem(shape), LAYERS[shape]
        sets = [base.with_adapters(name) for name in adapters]
        for count in tokens:
            pairs, named = count * spec.top_k, zip(sets, adapters, strict=True)
            timer = CandidateTimer([p.with_tokens(count, "uniform", ADAPTERS[name]) for p, name in named], repeats, log)
            best = best_of(timer, pairs, spec.num_experts, tiles_only)
            first = tile_candidates(pairs, spec.num_experts)[0]
            measured = {
                "us": dict(zip(adapters, timer.times[best], strict=True)),
                "heuristic_us": dict(zip(adapters, timer.times[first], strict=True)),
            }
            add_entries(content, base, pairs, best, measured)
            with writing_to(out):
                out.parent.mkdir(parents=True, exist_ok=True)
                whole_file(out, json.dumps(content, indent=1) + "\n")
            yield {"shape": shape, "tokens": count, "best": best, "gain": 1 - timer.score(best, first), **measured}


def check_cells(shapes: Sequence[str], tokens: Sequence[int], adapters: Sequence[str]) -> None:
    """Checks the cells before anything is measured.

    Args:
      shapes: layers in `specs.LAYERS`.
      tokens: numbers of tokens.
      adapters: sets of adapters in `specs.ADAPTERS`.

    Raises:
      InputError: a name is unknown, or a number of pairs is not a power of two.
    """
    for what, names, known in (("shape", shapes, LAYERS), ("adapters", adapters, ADAPTERS)):
        for name in names:
            if name not in known:
                raise InputError(f"--{what} is {name!r}; expected one of {', '.join(known)}.")
    for shape in shapes:
        top_k = LAYERS[shape].top_k
        for count in tokens:
            if bucket(count * top_k) != count * top_k:
                raise InputError(
                    f"--tokens {count} times top-{top_k} is not a power of two; a tuned file has only those."
                )


def read_or_new(path: Path, command: str) -> dict[str, Any]:
    """The content of a tuned file, or of a new one, with this run's device, date, versions and command.

    Args:
      path: the file; it need not exist.
      command: the command that was run.

    Returns:
      The content.

    Raises:
      InputError: the file is not a tuned file, or was tuned on another device.
    """
    head = about([])
    head = {name: head[name] for name in ("device", "date", "versions")} | {"command": command, "method": METHOD}
    try:
        old = tuned_file.read(path) if path.exists() else {"device": head["device"], "tiles": [], "matmuls": []}
    except tuned_file.TunedFileError as error:
        raise InputError(str(error)) from error
    if old["device"] != head["device"]:
        raise InputError(f"{path} was tuned on {old['device']}, this is {head['device']}; give another --out.")
    return head | {"tiles": old["tiles"], "matmuls": old["matmuls"]}


def add_entries(content: dict[str, Any], problem: Problem, pairs: int, best: Candidate, measured: Any) -> None:
    """Replaces a cell's entries; only configs that differ from the heuristic's become entries.

    Args:
      content: the content of the tuned file, changed in place.
      problem: the cell's layer.
      pairs: routed rows, tokens times top-k.
      best: the cell's best candidate.
      measured: the times, which are kept in the entries.
    """
    experts, rows = problem.config.num_experts, best.gate_up.tile_rows
    tile_key = {"experts": experts, "pairs": pairs}
    content["tiles"] = [e for e in content["tiles"] if {k: e[k] for k in tile_key} != tile_key]
    if rows != heuristic(pairs, experts).tile_rows:
        content["tiles"].append(tile_key | {"tile_rows": rows} | measured)
    gate, up, down = (dense(w, "bfloat16") for w in (problem.experts.gate, problem.experts.up, problem.experts.down))
    for weights, config in (((gate, up), best.gate_up), ((down,), best.down)):
        key = vars(MatmulShape.from_weights(weights, pairs))
        content["matmuls"] = [e for e in content["matmuls"] if {k: e[k] for k in key} != key]
        if config != heuristic(pairs, experts, rows):
            cut = {name: getattr(config, name) for name in ("tile_rows", "stages", "warpgroups")}
            content["matmuls"].append(key | cut | measured)
