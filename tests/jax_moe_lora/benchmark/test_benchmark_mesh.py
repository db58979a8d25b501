"""The whole model's benchmark on a mesh: a row says which, and its bank lies as a real one."""

import json

import pytest

from jax_moe_lora import InputError
from jax_moe_lora.cli.bench_model import bench_model
from support.meshes import run_on_devices


@pytest.mark.slow(30)
def test_bench_model_measures_a_mesh(tmp_path):
    (report,) = run_on_devices(8, "mesh_bench", str(tmp_path), "data=2,expert=2,tensor=2")
    (row,) = json.loads(report["text"])["rows"]
    assert "error" not in row, row
    assert row["mesh"] == "data=2,expert=2,tensor=2"
    assert row["ms"] > 0
    assert report["alike"]


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_compiled():
    with pytest.raises(InputError, match="needs 64 devices"):
        bench_model(model="tiny", mesh="expert=64")
