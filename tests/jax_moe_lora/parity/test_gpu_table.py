"""Every kind of adapter beside plain torch, on a GPU: `JAX_PLATFORMS=cuda pytest -m gpu tests/jax_moe_lora/parity`."""

import pytest

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.parity import table
from pallas_kernels.backend import choose
from pallas_kernels.errors import UnsupportedImplementation

pytestmark = [pytest.mark.gpu, pytest.mark.parity]
SHAPES = {
    "small": (MoEConfig(128, 192, 8, 2), 33),
    "wide": (MoEConfig(512, 256, 32, 4), 70),
}


@pytest.mark.parametrize("torch_device", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("implementation", "dtypes"),
    [
        ("hopper", ("bfloat16", "float16")),
        ("portable", ("bfloat16", "float16")),
        ("xla", ("float32", "bfloat16", "float16")),
    ],
)
def test_every_kind_of_adapter_equals_plain_torch_on_a_gpu(implementation, dtypes, shape, torch_device):
    import torch

    if torch_device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a torch that uses the GPU")
    try:
        choose(implementation)
    except UnsupportedImplementation as error:
        pytest.skip(str(error))
    config, tokens = SHAPES[shape]
    rows = table(config, tokens, 16, dtypes, implementation=implementation, torch_device=torch_device)
    assert [row for row in rows if not row.within] == []
