"""The search for configs, with a made-up clock in place of the GPU; the candidates' layer is lowered for one."""

import json
from functools import partial

import jax
import pytest

from jax_moe_lora import InputError
from jax_moe_lora.benchmark import tune as tuner
from jax_moe_lora.benchmark.problem import make_problem
from jax_moe_lora.benchmark.tune import Candidate, matmul_candidates, run_candidate, tile_candidates
from jax_moe_lora.cli.tune import tune
from pallas_kernels.hopper import tuned_file, tuning
from pallas_kernels.hopper.tuned_file import config_for
from pallas_kernels.hopper.tuning import HopperConfig, MatmulShape, bucket, heuristic, why_not
from pallas_kernels.ops import Choice
from pallas_kernels.specs import ADAPTERS, LAYERS, TOKENS

ALL_SHAPES = [(spec.num_experts, count * spec.top_k) for spec in LAYERS.values() for count in TOKENS]


@pytest.fixture
def clock(monkeypatch):
    """`clock(us)`: a GPU on which a candidate takes `us(candidate)` microseconds; the candidates it was asked for."""
    monkeypatch.setattr(tuner, "choose", lambda: Choice("hopper", {}))
    asked: list[Candidate] = []

    def use(us) -> list[Candidate]:
        def compile_layer(problem, layer: partial, method):
            (candidate,) = layer.args
            asked.append(candidate)
            figure = us(candidate)
            return lambda repeats: {"layer_us": figure, "rel_err": 1e-3} if figure else {"layer_us": 1, "rel_err": 0.5}

        monkeypatch.setattr(tuner, "compile_layer", compile_layer)
        return asked

    return use


def entries(path):
    content = json.loads(path.read_text())
    return content["tiles"], content["matmuls"]


@pytest.mark.parametrize(("experts", "pairs"), ALL_SHAPES)
def test_all_candidates_are_valid_and_the_heuristic_is_the_first(experts, pairs):
    first, *others = tile_candidates(pairs, experts)
    assert first.gate_up == first.down == heuristic(pairs, experts)
    assert others
    for candidate in [first, *others, *matmul_candidates(first), *matmul_candidates(others[-1])]:
        assert candidate.gate_up.tile_rows == candidate.down.tile_rows
        assert not why_not(candidate.gate_up)
        assert not why_not(candidate.down)


@pytest.mark.slow
def test_the_faster_config_is_written_and_found_again(clock, tmp_path, monkeypatch):
    first = heuristic(128, 16)
    rows = next(c.gate_up.tile_rows for c in tile_candidates(128, 16)[1:] if c.gate_up != first)
    deepest = tuning.deepest(rows)

    def us(candidate):
        cost = 100.0 if candidate.gate_up.tile_rows == rows else 120.0
        return cost - 10 * (candidate.down.stages == deepest.stages - 2)

    clock(us)
    tune(out=tmp_path / "new" / "cpu.json", shape=["small"], tokens=[32])
    (tile,), (matmul,) = entries(tmp_path / "new" / "cpu.json")
    assert (tile["experts"], tile["pairs"], tile["tile_rows"]) == (16, 128, rows)
    assert tile["us"] == {"none": 90.0, "s8r16": 90.0}
    assert tile["heuristic_us"] == {"none": 120.0, "s8r16": 120.0}
    assert (matmul["gated"], matmul["in_width"], matmul["stages"]) == (False, 64, deepest.stages - 2)
    monkeypatch.setenv(tuned_file.VARIABLE, str(tmp_path / "new" / "cpu.json"))
    assert tuned_file.tile_rows(100, 16) == rows
    assert config_for(MatmulShape(16, 128, 64, 128, False, "bfloat16"), rows) == HopperConfig(rows, deepest.stages - 2)
    assert config_for(MatmulShape(16, 128, 128, 64, True, "bfloat16"), rows) == heuristic(128, 16, rows)


def test_a_gain_within_the_noise_is_no_entry_and_an_old_entry_goes(clock, tmp_path):
    out = tmp_path / "cpu.json"
    clock(lambda candidate: 50.0 if candidate.gate_up.tile_rows in (8, 64) else 60.0)  # the heuristic's: 16 and 32
    tune(out=out, shape=["small"], tokens=[32, 64], tiles_only=True)
    assert [tile["pairs"] for tile in entries(out)[0]] == [128, 256]
    clock(lambda candidate: 59.0 if candidate.gate_up.tile_rows == 8 else 60.0)
    tune(out=out, shape=["small"], tokens=[32], tiles_only=True)
    assert [tile["pairs"] for tile in entries(out)[0]] == [256]


def test_a_candidate_that_fails_or_is_wrong_is_left_out(clock, tmp_path, capsys):
    first = heuristic(128, 16)

    def us(candidate):
        if candidate.gate_up.tile_rows > first.tile_rows:
            raise RuntimeError("it does not compile")
        return 100.0 if candidate.gate_up == first else 0.0

    clock(us)
    tune(out=tmp_path / "cpu.json", shape=["small"], tokens=[32], tiles_only=True)
    assert entries(tmp_path / "cpu.json") == ([], [])
    said = capsys.readouterr().err
    assert "RuntimeError: it does not compile" in said
    assert "ValueError: its result is wrong: relative error 0.5" in said


def test_without_the_gpu_tune_says_so(tmp_path):
    with pytest.raises(InputError, match=r"tune times the Hopper kernels and cannot here: it needs a GPU of compute"):
        tune(out=tmp_path / "cpu.json")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": ["huge"]}, "--shape is 'huge'; expected one of"),
        ({"adapters": ["many"]}, "--adapters is 'many'; expected one of"),
        ({"tokens": [33]}, "--tokens 33 times top-4 is not a power of two"),
    ],
)
def test_bad_options_are_one_sentence(clock, tmp_path, wrong, message):
    asked = clock(lambda candidate: 1.0)
    with pytest.raises(InputError, match=message):
        tune(**{"out": tmp_path / "cpu.json", "shape": ["small"]} | wrong)
    assert not asked


def test_a_file_of_another_device_is_not_written_over(clock, tmp_path):
    clock(lambda candidate: 1.0)
    out = tmp_path / "h200.json"
    out.write_text(json.dumps({"device": "NVIDIA H200", "tiles": [], "matmuls": []}))
    with pytest.raises(InputError, match="was tuned on NVIDIA H200, this is cpu"):
        tune(out=out, shape=["small"])


@pytest.mark.slow
@pytest.mark.parametrize(("adapters", "tokens"), [("none", 32), ("mixed", 4096)])
def test_a_candidates_layer_lowers_for_a_gpu(adapters, tokens):
    problem = make_problem("small", adapters).with_tokens(tokens, "uniform", ADAPTERS[adapters])
    assert bucket(tokens * 4) == tokens * 4
    pooled = problem.adapters
    arguments = (problem.x, problem.weights, problem.chosen, problem.slots, problem.experts, pooled)
    first, *_, last = tile_candidates(tokens * 4, 16)
    for candidate in (first, last, *matmul_candidates(last)[-1:]):
        traced = jax.jit(partial(run_candidate, candidate)).trace(*arguments)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
