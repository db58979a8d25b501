"""Kernels and whole decode steps, compiled for an H200 on any machine.

Every Hopper kernel becomes SASS for sm_90a, with the CUDA 13 and the CUDA 12 packages.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["cuda13", "cuda12"])
def test_kernels_compile_without_spills_or_serialized_wgmma(cuda):
    python = ROOT / f".venv-{cuda}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"make .venv-{cuda}/full.stamp")
    result = subprocess.run(
        [python, ROOT / "tests" / "compile_kernels.py"],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) > 20, result.stderr[-2000:]
    kernels = 0
    for line in lines:
        assert line["error"] is None, line
        said = "\n".join(line["ptxas"])
        kernels += "registers" in said
        assert "C7510" not in said, f"{line['name']}: wgmma is serialized"
        assert "C7511" not in said, f"{line['name']}: wgmma is serialized"
        for report in line["ptxas"]:
            if "spill stores" in report:
                assert " 0 bytes spill stores, 0 bytes spill loads" in report, line
    assert kernels > 20


@pytest.mark.slow
def test_a_decode_step_is_one_cuda_graph_whatever_adapters_are_on():
    """Nothing is launched outside it, and no loop or branch waits for the host."""
    python = ROOT / ".venv-cuda13" / "bin" / "python"
    if not python.exists():
        pytest.skip("make .venv-cuda13/full.stamp")
    result = subprocess.run(
        [python, ROOT / "tests" / "compile_decode.py"],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 4, result.stderr[-2000:]
    for line in lines:
        assert line["graphs"] == 1, line
        assert line["outside"] == {}, line
        assert not {"kWhile", "kConditional"} & line["inside"].keys(), line
        assert line["donated"], line
