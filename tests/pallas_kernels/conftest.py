"""What the tests of kernels share."""

import pytest


@pytest.fixture
def interpreter(capfd):
    """Runs kernels in jax's GPU interpreter and fails where it reports a race: it prints one and goes on."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out
