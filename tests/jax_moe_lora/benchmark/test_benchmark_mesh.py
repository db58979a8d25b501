"""The whole model's benchmark on a mesh: a row says which, and its bank and weights lie as real ones."""

import json

import pytest

from jax_moe_lora import InputError
from jax_moe_lora.cli.bench_model import bench_model
from support.meshes import run_on_devices


@pytest.mark.slow(30)
@pytest.mark.parametrize("scheme", [(), ("int4",)])
def test_bench_model_measures_a_mesh(scheme, tmp_path):
    (report,) = run_on_devices(8, "mesh_bench", str(tmp_path), "data=2,expert=2,tensor=2", *scheme)
    (row,) = json.loads(report["text"])["rows"]
    assert "error" not in row, row
    assert row.get("quantise") == next(iter(scheme), None)
    assert row["mesh"] == "data=2,expert=2,tensor=2"
    assert row["ms"] > 0
    assert report["alike"]
    if scheme:  # before anything is compiled
        assert "tensor=2 cuts through blocks of 128 rows of layers.0.q [128, 128]" in report["refused"]


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_compiled():
    with pytest.raises(InputError, match="needs 64 devices"):
        bench_model(model="tiny", mesh="expert=64")
