"""The benchmark command on a CPU: what it writes, and that it compares with the oracle."""

import csv
import json

import pytest

from jax_moe_lora import InputError
from jax_moe_lora.benchmark.command import bench

SMALL = {"shape": ["small"], "adapters": ["mixed"], "tokens": [3], "repeats": 1, "loop": False}


def test_bench_writes_the_peers_columns_and_how_it_was_measured(tmp_path):
    bench(**SMALL, out=tmp_path / "some" / "cpu")
    with (tmp_path / "some" / "cpu.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["shape", "tokens", "adapters", "engine", "layer_us", "floor_us", "rel_err"]
    assert (row["shape"], row["tokens"], row["adapters"]) == ("small", "3", "mixed")
    assert float(row["layer_us"]) > 0
    assert 0 < float(row["rel_err"]) < 1e-2  # bfloat16 against the float32 oracle
    about = json.loads((tmp_path / "some" / "cpu.json").read_text())
    assert {"device", "date", "versions", "command", "method", "ceilings", "rows"} <= about.keys()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": ["huge"]}, "'huge', 'mixed': expected a shape of"),
        ({"routing": "odd"}, "routing is 'odd'; expected one of"),
        ({"implementation": "fast"}, "'fast' is unknown"),
        ({"plot": True}, "--plot came without --out"),
    ],
)
def test_bad_options_are_one_sentence(wrong, message):
    with pytest.raises(InputError, match=message):
        bench(**SMALL | wrong)


def test_peers_that_are_not_there_are_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*peers.csv"):
        bench(**SMALL, peers=tmp_path / "peers.csv")
