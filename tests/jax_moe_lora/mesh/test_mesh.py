"""A mesh changes no answer: layers, families and whole models over eight CPU devices equal those of one."""

import json
import os
import subprocess

import pytest

from support import ROOT
from support.meshes import run_on_devices

# Every mesh of eight devices, and one of fewer than there are.
SHAPES = [
    "data=2,expert=2,tensor=2",
    "expert=8",
    "tensor=8",
    "data=8",
    "data=2,expert=4",
    "data=4,expert=2",
    "data=2,tensor=4",
    "data=4,tensor=2",
    "expert=2,tensor=4",
    "expert=4,tensor=2",
    "expert=2,tensor=2",
]
# Attention over all heads of a projection, latent attention, delta-net, dense beside routed, a fused shared expert.
FAMILIES = ["olmoe", "deepseek_v3", "qwen3_next", "gemma4_text", "granitemoeshared"]


def parts(mesh: str, axis: str) -> int:
    return dict(entry.split("=") for entry in mesh.split(",")).get(axis, 1) != 1


@pytest.mark.slow(140)
def test_one_layer_on_every_mesh_equals_one_device():
    reports = run_on_devices(8, "mesh_layers", *SHAPES)
    assert [report["mesh"] for report in reports] == SHAPES
    for report in reports:
        assert report["error"] < 1e-6, report
        assert report["on_one_expert"] < 1e-6, report
        assert report["routing_matters"] > 0.1, report
        # One sum at the end of attention where heads are split, one at the end of the MLP; no other collective.
        tensor, expert = parts(report["mesh"], "tensor"), parts(report["mesh"], "expert")
        sums = tensor + (tensor or expert)
        assert report["collectives"] == ({"all-reduce": sums} if sums else {}), report
        assert report["summed"] == report["predicted"], report  # those of the scaling model
    for report in reports[:2]:
        assert report["base_is_exact"], report
        assert report["mixed_is_solo"], report
        assert report["adapters_matter"], report
        assert report["without_adapters"] == report["collectives"], report


@pytest.mark.slow(160)
def test_layers_of_other_families_equal_one_device():
    reports = run_on_devices(4, "mesh_families", "data=2,tensor=2", *FAMILIES)
    assert [report["family"] for report in reports] == FAMILIES
    for report in reports:
        assert report["error"] < 1e-5, report
        assert report["summed"] == report["predicted"], report


@pytest.mark.slow(180)
def test_a_model_on_a_mesh_gives_the_answers_of_one_device(tmp_path):
    meshes = ["data=2,expert=2,tensor=2", "expert=4"]
    reports = run_on_devices(8, "mesh_models", str(tmp_path / "model"), *meshes)
    assert [report["mesh"] for report in reports] == meshes
    for report in reports:
        assert report["error"] < 1e-5, report
        assert report["answers"], report
        assert report["read_once"][0] == report["read_once"][1], report
    for report in reports[:1]:
        assert report["loop"] < 1e-5, report
        assert report["compilations"] == 0, report
        assert report["same_after_reloading"], report
        assert "on one device" in report["export"], report
    shares = [(report["parts"]["experts"], report["parts"]["pages"]) for report in reports]
    assert shares[0] == (1 / 4, pytest.approx(0.4, abs=0.1))  # pages as wide as D are not split by columns
    assert shares[1] == (1 / 4, 1 / 4)


@pytest.mark.slow(60)
def test_the_kernels_lower_for_two_gpus():
    python = ROOT / ".venv-cuda13" / "bin" / "python"
    if not python.exists():
        pytest.skip("make .venv-cuda13/full.stamp")
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [python, "-m", "support.lower_mesh", "expert", "tensor"]
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["axis"], line["sums"]) for line in lines] == [("expert", 1)] * 2 + [("tensor", 2)] * 2
    assert all(line["kernels"] > 0 for line in lines)
