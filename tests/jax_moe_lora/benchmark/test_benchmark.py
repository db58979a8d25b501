"""The bench command on a CPU: what it writes, that it compares with the oracle, that one failure is not the end."""

import csv
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import typer

from jax_moe_lora import InputError
from jax_moe_lora.adapters.lora import EXPERT_MODULES
from jax_moe_lora.benchmark import oracle, report, roofline, sweep
from jax_moe_lora.benchmark.peers import PEERS, find_peers
from jax_moe_lora.benchmark.problem import Problem, make_problem
from jax_moe_lora.benchmark.quantised import quantised
from jax_moe_lora.cli.bench import bench
from jax_moe_lora.layer import reference
from pallas_kernels.ops import RANK_PAGE
from pallas_kernels.specs import ADAPTERS

SMALL = {"shape": ["small"], "adapters": ["mixed"], "tokens": [3], "repeats": 1, "method": "queue"}
PEER_COLUMNS = ["shape", "tokens", "adapters", "engine", "layer_us", "floor_us", "rel_err"]
WEIGHTS_ARE_BFLOAT16 = 1e-2


def drawn(adapters: str, tokens: int, slots: str = "uniform", routing: str = "uniform") -> Problem:
    return make_problem("small", adapters).with_tokens(tokens, routing, ADAPTERS[adapters], slots)


def by_numpy(problem: Problem, rows: np.ndarray) -> np.ndarray:
    """The rows by the reference's own linear, token by token."""
    wide = {m: np.asarray(getattr(problem.experts, m).astype(jnp.float32)) for m in EXPERT_MODULES}
    x, out = np.asarray(problem.x.astype(jnp.float32)), []
    for t in rows:
        slot, total = int(problem.slots[t]), np.zeros(x.shape[1], np.float32)
        for k, expert in enumerate(np.asarray(problem.chosen[t])):
            own = {m: matrices(problem, m, slot, expert) for m in EXPERT_MODULES} if slot >= 0 else None
            weights = {m: wide[m][expert][None] for m in EXPERT_MODULES}
            gate, up = (reference._linear(x[t], m, 0, weights, own, np.float32) for m in ("gate", "up"))
            hidden = gate / (1 + np.exp(-gate)) * up
            total += float(problem.weights[t, k]) * reference._linear(hidden, "down", 0, weights, own, np.float32)
        out.append(total)
    return np.stack(out)


def matrices(problem: Problem, module: str, slot: int, expert: int):
    pages = problem.adapters[module]
    first_a, first_b, count, _ = (int(v) for v in pages.table[slot, expert])
    a, b = (
        np.asarray(pool[first : first + count].astype(jnp.float32)).reshape(count * RANK_PAGE, -1)
        for pool, first in ((pages.a, first_a), (pages.b, first_b))
    )
    return a[None], b.T[None], float(pages.scale[slot, expert])


@pytest.mark.slow
@pytest.mark.parametrize(("adapters", "tokens"), [("none", 5), ("mixed", 1), ("mixed", 40)])
def test_the_oracle_on_the_device_equals_the_reference(adapters, tokens):
    problem = drawn(adapters, tokens)
    rows = oracle.checked_rows(tokens)
    assert {0, tokens - 1} <= set(rows.tolist())
    wanted = by_numpy(problem, rows)
    assert np.linalg.norm(oracle.expected(problem) - wanted) / np.linalg.norm(wanted) < 1e-5


@pytest.mark.slow
def test_bench_writes_the_peers_columns_and_how_it_was_measured(tmp_path):
    bench(**SMALL, out=tmp_path / "some" / "cpu")
    with (tmp_path / "some" / "cpu.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row)[: len(PEER_COLUMNS)] == PEER_COLUMNS
    assert (row["shape"], row["tokens"], row["adapters"], row["slots"]) == ("small", "3", "mixed", "uniform")
    assert float(row["layer_us"]) > 0
    assert 0 < float(row["rel_err"]) < WEIGHTS_ARE_BFLOAT16
    about = json.loads((tmp_path / "some" / "cpu.json").read_text())
    assert {"device", "date", "versions", "commands", "method", "ceilings", "tuned", "rows"} <= about.keys()
    problem = drawn("mixed", 3)
    assert int(row["hit_experts"]) == len(np.unique(problem.chosen))
    draws = np.load(tmp_path / "some" / "cpu.npz")
    for name, array in (("chosen", problem.chosen), ("slots", problem.slots), ("weights", problem.weights)):
        assert np.array_equal(draws[f"{row['draw']}.{name}"], array)


@pytest.mark.slow
def test_the_loop_is_checked_and_the_smaller_method_counts(tmp_path):
    bench(**SMALL | {"method": "both", "adapters": ["s8r16"]}, out=tmp_path / "cpu")
    (row,) = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert row["layer_us"] == min(row["loop_us"], row["queue_us"])
    assert 0 < row["rel_err"] < WEIGHTS_ARE_BFLOAT16


@pytest.mark.slow
def test_quantised_weights_are_timed_beside_the_16_bit_layer_on_the_same_draw(tmp_path):
    bench(**SMALL, quantise=["mxfp4"], out=tmp_path / "cpu")
    content = json.loads((tmp_path / "cpu.json").read_text())
    wide, *few = content["rows"]
    assert [row["engine"] for row in few] == ["jax_moe_lora/mxfp4"]
    assert "best_peer" not in wide
    for row in few:
        assert row["draw"] == wide["draw"]
        assert row["best_peer"] == "jax_moe_lora"
        assert row["times_as_fast"] == pytest.approx(wide["layer_us"] / row["layer_us"], abs=1e-3)
        assert 0 < row["rel_err"] < WEIGHTS_ARE_BFLOAT16  # of the numbers that the quantised weights hold


def test_the_bytes_of_a_quantised_layer_are_those_of_values_and_scales():
    problem = make_problem("small").with_tokens(3, "uniform", ADAPTERS["none"])
    hit, weights = len(np.unique(problem.chosen)), 3 * 128 * 64
    assert problem.moved_bytes() == hit * weights * 2
    for scheme, nbytes in (("mxfp4", weights * 4.25 / 8), ("int4", weights * 4.5 / 8), ("fp8", weights + 3 * 4)):
        few = replace(problem, experts=quantised(problem.experts, scheme))
        assert few.moved_bytes() == hit * nbytes


@pytest.mark.slow
def test_keep_adds_to_earlier_results_and_measures_a_cell_once(tmp_path):
    out = tmp_path / "cpu"
    bench(**SMALL, out=out)
    bench(**SMALL | {"tokens": [3, 5]}, out=out, keep=True)
    content = json.loads(out.with_suffix(".json").read_text())
    assert [row["tokens"] for row in content["rows"]] == [3, 5]
    assert len(content["commands"]) == 2


@pytest.mark.slow
def test_floors_that_are_kept_together_are_of_the_same_ceilings(tmp_path):
    out = tmp_path / "cpu"
    bench(**SMALL, out=out)
    content = json.loads(out.with_suffix(".json").read_text())
    content["ceilings"] = {"bytes_per_s": 1e6, "flop_per_s": 1e6}  # as another process may have found them
    out.with_suffix(".json").write_text(json.dumps(content))
    bench(**SMALL, out=out, keep=True)
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["ceilings"] == content["ceilings"]
    assert found["rows"][0]["floor_us"] > 100 * content["rows"][0]["floor_us"]


@pytest.mark.slow
def test_sweeps_that_take_turns_never_measure_at_once(tmp_path):
    inside, most = [], []

    class Slow:
        name = "slow"

        def why_not(self, adapters):
            return ""

        def prepare(self, problem, method):
            return lambda repeats: self.measure()

        def measure(self):
            inside.append(self)
            time.sleep(0.05)
            most.append(len(inside))
            inside.remove(self)
            return {}

    def run():
        return list(sweep.sweep(sweep.Cells(["small"], ["none"], [1, 2, 3]), [Slow()], turns=tmp_path))

    with ThreadPoolExecutor(3) as pool:
        rows = [done.result() for done in [pool.submit(run) for _ in range(3)]]
    assert [len(own) for own in rows] == [3, 3, 3]
    assert most == [1] * 9


@pytest.mark.slow
def test_runs_that_keep_one_out_add_to_it_together(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(bench, **SMALL | {"tokens": [t]}, out=tmp_path / "cpu", keep=True) for t in (3, 5)]
        for one in runs:
            one.result()
    content = json.loads((tmp_path / "cpu.json").read_text())
    assert sorted(row["tokens"] for row in content["rows"]) == [3, 5]


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    real = sweep.compile_layer

    def failing(problem, *arguments):
        if problem.x.shape[0] == 2:
            raise RuntimeError("out of something")
        return real(problem, *arguments)

    monkeypatch.setattr(sweep, "compile_layer", failing)
    with pytest.raises(typer.Exit) as exit_of:
        bench(**SMALL | {"tokens": [2, 3]}, out=tmp_path / "cpu")
    assert exit_of.value.exit_code == 1
    assert "RuntimeError: out of something" in capsys.readouterr().out
    failed, measured = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    assert (failed["tokens"], failed["error"]) == (2, "RuntimeError: out of something")
    assert measured["layer_us"] > 0
    assert len((tmp_path / "cpu.csv").read_text().splitlines()) == 2  # the header and the cell that has figures


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_wrong_result_is_a_failure(monkeypatch, factor):
    real = sweep.library_layer

    def wrong(problem, implementation):
        return lambda x, *others: real(problem, implementation)(x, *others) * jnp.asarray(factor, x.dtype)

    monkeypatch.setattr(sweep, "library_layer", wrong)
    cells = sweep.Cells(["small"], ["none"], [3])
    (row,) = sweep.sweep(cells, [sweep.ThisLibrary()], 1, "queue")
    assert row["error"].startswith("ValueError: the result is wrong: relative error ")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": ["huge"]}, "shape is 'huge'; expected one of"),
        ({"adapters": ["many"]}, "adapters are 'many'; expected one of"),
        ({"routing": "odd"}, "routing is 'odd'; expected one of"),
        ({"slots": "odd"}, "slots are 'odd'; expected one of"),
        ({"quantise": ["fp3"]}, "--quantise is 'fp3'; expected one of fp8, mxfp4"),
        ({"quantise": ["int4_g128"]}, "--shape small has matrices of 64 columns, and int4_g128 takes multiples of 128"),
        ({"method": "odd"}, "--method is 'odd'; expected both, loop or queue"),
        ({"implementation": "fast"}, "'fast' is unknown"),
        ({"peer": ["fast"]}, "--peer is 'fast'; expected one of"),
        ({"plot": True}, "--plot came without --out"),
        ({"keep": True}, "--keep came without --out"),
    ],
)
def test_bad_options_are_one_sentence(wrong, message):
    with pytest.raises(InputError, match=message):
        bench(**SMALL | wrong)


def test_results_of_another_command_are_not_added_to(tmp_path):
    (tmp_path / "cpu.json").write_text("{}")
    with pytest.raises(InputError, match="holds no results of this command"):
        bench(**SMALL, out=tmp_path / "cpu", keep=True)


def row(adapters: str, tokens: int, reached: float, **more) -> report.ResultRow:
    cell = {"shape": "olmoe", "adapters": adapters, "tokens": tokens, "engine": "jax_moe_lora", "layer_us": reached}
    return cell | {"floor_us": 50.0, "rel_err": 1e-3, "routing": "uniform", "slots": "uniform", "draw": "d"} | more


def test_a_row_is_compared_with_the_best_peer_on_the_same_draw_alone():
    ours = [row("none", 1, 50.0), row("none", 8, 100.0), row("none", 9, 1.0), row("none", 1, 9.0, slots="one")]
    peers = [
        row("none", 1, 100.0, engine="torch"),
        row("none", 8, 80.0, engine="torch"),
        row("none", 8, 50.0, engine="vllm"),
        row("none", 8, 1.0, engine="vllm", error="lost"),
        row("none", 9, 2.0, engine="torch", draw="another"),
    ]
    rows = report.compared([*ours, row("none", 512, 1.0, error="lost"), *peers])
    assert [(r.get("best_peer"), r.get("times_as_fast")) for r in rows[:2]] == [("torch", 2.0), ("vllm", 0.5)]
    assert not any("best_peer" in r for r in rows[2:])
    assert report.compared(rows) == rows
    floor, against = report.summary(rows[:2])
    assert floor.startswith("0.71 of the floor's speed (geometric mean of 2 cells); least 0.50: olmoe none T=8")
    assert against == (
        "1.00 times as fast as the best peer without adapters (geometric mean of 2 cells); "
        "slower in 1: olmoe none T=8 (0.50)."
    )
    assert report.summary(rows)[1] == against
    few = [row("none", count, 40.0, engine="jax_moe_lora/fp8") for count in (1, 8)]
    backend = row("none", 1, 10.0, engine="jax_moe_lora[xla]/fp8")  # there is no 16-bit row of this backend
    rows = report.compared([*ours, *few, backend, *peers])
    assert [(r.get("best_peer"), r.get("times_as_fast")) for r in rows[:2]] == [("torch", 2.0), ("vllm", 0.5)]
    assert [r.get("times_as_fast") for r in rows[4:7]] == [1.25, 2.5, None]
    assert rows[4]["best_peer"] == "jax_moe_lora"
    assert report.summary(rows)[-1] == (
        "1.77 times as fast as the 16-bit layer: jax_moe_lora/fp8 (geometric mean of 2 cells; 1.25 to 2.50)."
    )


@pytest.mark.slow
def test_the_plot_is_drawn_without_the_cells_that_failed(tmp_path):
    rows = [row("none", 1, 60.0), row("none", 4096, 70.0), row("s8r16", 1, 80.0), row("s8r16", 8, 0.0, error="lost")]
    roofline.save_roofline(rows, "a title", tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 10_000


@pytest.mark.slow
def test_slots_are_distributed_as_asked():
    half, one, mixed = (drawn("s8r16", 400, slots="half-base"), drawn("s8r16", 400, slots="one"), drawn("mixed", 400))
    for problem in (half, mixed):
        assert 0.4 < float((problem.slots < 0).mean()) < 0.6
        assert set(np.unique(problem.slots)) == set(range(-1, 8))
    assert set(np.unique(one.slots)) == {0}
    assert set(np.unique(drawn("none", 5, slots="one").slots)) == {-1}


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "adapters"),
    [
        ("ragged_dot", "none"),
        ("torch_grouped_mm", "none"),
        ("transformers_peft", "none"),
        ("transformers_peft", "s1r16"),
    ],
)
def test_a_peers_layer_equals_the_oracle(name, adapters):
    said: list[str] = []
    (peer,) = find_peers([name], [adapters], said.append)
    assert not said
    assert peer.why_not(adapters) == ""
    assert peer.why_not("s8r16")
    measured = peer.prepare(drawn(adapters, 9), "queue")(1)
    assert measured["layer_us"] > 0
    assert 0 < measured["rel_err"] < WEIGHTS_ARE_BFLOAT16


def test_a_peer_that_is_not_installed_is_left_out_in_a_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    said: list[str] = []
    assert find_peers(["tokamax", "ragged_dot"], ["none", "s8r16"], said.append) == [PEERS["ragged_dot"]]
    assert said == [
        "tokamax is left out: tokamax is not installed.",
        "ragged_dot is left out of the cells with s8r16: it takes no adapters.",
    ]


def test_shapes_and_adapters_are_called_as_the_peers_call_them():
    from pallas_kernels.specs import LAYERS, TOKENS

    assert {"qwen3-30b-a3b", "olmoe", "mixtral-8x7b", "gpt-oss-20b-like"} <= LAYERS.keys()
    assert {"none", "s1r16", "s8r16", "s8r64", "s32r16"} <= ADAPTERS.keys()
    assert TOKENS == (1, 8, 32, 128, 512, 2048, 8192)


def test_committed_results_have_the_peers_columns():
    for path in (Path(report.__file__).parents[2] / "pallas_kernels" / "results").glob("*.csv"):
        assert path.read_text().splitlines()[0].split(",")[: len(PEER_COLUMNS)] == PEER_COLUMNS
        assert path.with_suffix(".json").exists()
