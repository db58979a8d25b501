"""The layer and its gradient under `jax.shard_map` as it comes, with its check of what varies over the mesh."""

import json
import os
import subprocess
import sys

import jax
import pytest

from support import ROOT
from support.split_layer import assert_split_equals_whole


def run(python, *arguments, **environment):
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run(
        [python, *arguments], env=os.environ | path | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_the_layer_and_its_gradient_on_two_devices_equal_one():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    assert run(sys.executable, "-m", "support.split_layer", "xla", "reference", **flags) == "equal\n"


@pytest.mark.slow
def test_the_kernels_and_their_gradients_lower_for_two_gpus():
    python = ROOT / ".venv-cuda13" / "bin" / "python"
    if not python.exists():
        pytest.skip("make .venv-cuda13/full.stamp")
    lines = [json.loads(line) for line in run(python, "-m", "support.lower_shard_map").splitlines()]
    assert [line["backend"] for line in lines] == ["hopper", "portable"]
    assert all(min(line["kernels"]) > 0 for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["hopper", "portable", "xla"])
def test_the_layer_and_its_gradient_under_shard_map_equal_the_whole_on_a_gpu(implementation):
    assert_split_equals_whole(implementation, "bfloat16", len(jax.devices()), limit=1e-2)
