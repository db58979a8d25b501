"""Kernels and whole decode steps, compiled on any machine, with the CUDA 13 and the CUDA 12 packages.

The Hopper kernels become SASS for sm_90a, the portable ones for a GPU of each generation from sm_80 on.
"""

import json
import os
import re
import subprocess

import pytest

from support import ROOT

# Against hanging alone: ten minutes for each kernel, which takes seconds.
NO_HANG = pytest.mark.timeout(600 * 30)


@pytest.mark.slow(60)
@NO_HANG
@pytest.mark.parametrize("part", ["1/2", "2/2"])
def test_hopper_kernels_compile_without_spills_or_serialized_wgmma(part):
    assert compile_all("cuda13", "hopper", "h200", part) > 15


@pytest.mark.slow(30)
@NO_HANG
def test_a_layer_of_few_tokens_runs_no_kernel_of_the_sorted_plan():
    """One kernel plans and lists steps; beside it there are matmuls, and shrinks where there are adapters."""
    lines = run_script("compile_kernels.py", "hopper", "h200", "1/1", "few tokens")
    kernels = {line["name"]: sum("Used " in report for report in line["ptxas"]) for line in lines}
    assert kernels == {
        "steps of 8 slots, few tokens": 1,
        "steps of 256 slots, few tokens": 1,
        "layer of few tokens, lora=True": 5,
        "layer of few tokens, lora=False": 3,
    }


@pytest.mark.slow(40)
@NO_HANG
def test_hopper_kernels_compile_with_the_older_compiler_too():
    """Those that hold the most registers."""
    assert compile_all("cuda12", "hopper", "h200", "1/1", "192 .*lora=True") > 2


@pytest.mark.slow(20)
# The other GPUs and the older compiler see a part of the kernels.
@pytest.mark.parametrize(
    ("cuda", "gpu", "pattern", "least"),
    [("cuda13", "a100", "", 12)]
    + [("cuda13", gpu, "matmul 64 .*lora=True|shrink 64", 2) for gpu in ("l40s", "h200", "b200", "rtx6000pro")]
    + [("cuda12", "a100", "matmul 64 .*lora=True", 1)],
)
def test_portable_kernels_compile_without_spills(cuda, gpu, pattern, least):
    assert compile_all(cuda, "portable", gpu, "1/1", pattern) > least


def run_script(name: str, *arguments: str, cuda: str = "cuda13") -> list[dict]:
    """The lines of JSON that a script prints, in the environment that compiles for GPUs."""
    python = ROOT / f".venv-{cuda}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"make .venv-{cuda}/full.stamp")
    result = subprocess.run(
        [python, ROOT / "tests" / "support" / name, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def compile_all(cuda: str, backend: str, gpu: str, part: str, pattern: str = "") -> int:
    """Compiles kernels of these names in a process of its own and returns how many; each must be free of spills."""
    lines = run_script("compile_kernels.py", backend, gpu, part, pattern, cuda=cuda)
    kernels = 0
    for line in lines:
        assert line["error"] is None, line
        said = "\n".join(line["ptxas"])
        kernels += "registers" in said
        # C7519 says that the compiler waits for registers that wgmma reads, as it must.
        assert not re.search("C751[0-8]", said), f"{line['name']}: wgmma is serialized"
        for report in line["ptxas"]:
            if "spill stores" in report:
                assert " 0 bytes spill stores, 0 bytes spill loads" in report, line
    return kernels


@pytest.mark.slow(30)
def test_a_decode_step_is_one_cuda_graph_whatever_adapters_are_on():
    """Nothing is launched outside it, and no loop or branch waits for the host."""
    lines = run_script("compile_decode.py")
    assert len(lines) == 2
    for line in lines:
        assert line["graphs"] == 1, line
        assert line["outside"] == {}, line
        assert not {"kWhile", "kConditional"} & line["inside"].keys(), line
        assert line["donated"], line


@pytest.mark.slow(40)
def test_the_layer_takes_the_rows_and_one_activation_and_little_else():
    """No copy of the weights, no delta, no second array of P x D: the down projection's rows reuse the first one."""
    lines = run_script("compile_memory.py", "none", "s8r64")
    assert len(lines) == 2
    for line in lines:
        # What adapters add is H, 64 ranks a step: as many steps as the static bound of the slots and ranks.
        allowed = 1.03 if line["adapters"] == "none" else 1.25
        assert line["temp"] <= allowed * (line["rows"] + line["activation"]), line
