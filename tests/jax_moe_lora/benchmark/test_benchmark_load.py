"""The benchmark of loading on a CPU: what it writes, and that its adapters are the sizes that it says."""

import json

import pytest

from jax_moe_lora.benchmark.load import host_adapter
from jax_moe_lora.benchmark.models import model_config
from jax_moe_lora.benchmark.random_model import sites_of
from jax_moe_lora.cli.bench_load import bench_load


@pytest.mark.slow
def test_bench_load_writes_both_adapters_and_decoding_beside_them(tmp_path):
    bench_load(model="tiny", layers=1, rank=4, batch=2, context=4, out=tmp_path / "cpu")
    (row,) = json.loads((tmp_path / "cpu.json").read_text())["rows"]
    for name in ("per-expert", "shared-outer"):
        assert row[name]["load_ms"] > 0
        assert row[name]["steps_under_load"] > 0
        assert row[name]["loads_meanwhile"] > 0
    assert row["per-expert"]["mb"] > row["shared-outer"]["mb"]


def test_the_adapters_have_the_sizes_of_the_models_own():
    """A per-expert adapter of rank 16 on all layers of Qwen3-30B-A3B is 1.7 GB, its shared-outer twin 0.5 GB."""
    sites = sites_of(model_config("qwen3-30b-a3b", 1), "experts")
    for shared, gigabytes in ((False, 1.66), (True, 0.47)):
        held = host_adapter("some", sites, 16, shared)
        nbytes = sum(weights.a.nbytes + weights.b.nbytes for weights in held.weights.values())
        assert 48 * nbytes == pytest.approx(gigabytes * 1e9, rel=0.02)
