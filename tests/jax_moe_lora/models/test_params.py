"""Random parameters begin as a model's do: norms at one, biases at zero, matrices small."""

import jax
import numpy as np
import pytest

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models.params import init_params
from support.models import decoder_config


@pytest.mark.slow
def test_random_biases_are_zero_and_norms_are_one():
    moe = MoEConfig(8, 8, 8, 2, expert_bias=True)  # each shape compiles once: few of them
    config = decoder_config("any", 8, 8, (2, 2, 4), moe, shared_width=8, biases="qkvo", qk_norm="projection")
    leaves, _ = jax.tree.flatten_with_path(init_params(config, jax.random.key(0), "float32"))
    values = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    constant = {name: leaf.flat[0].item() for name, leaf in values.items() if np.ptp(leaf) == 0}
    biases = {f".layers[0]['{module}_bias']": 0 for module in (*"qkvo", "gate", "up", "down")}
    norms = {f".layers[0]['{name}_norm']": 1 for name in ("q", "k", "attention", "mlp")} | {".norm": 1}
    assert constant == biases | norms
    drawn = np.concatenate([leaf.ravel() for name, leaf in values.items() if name not in constant])
    assert 0.015 < drawn.std() < 0.025
