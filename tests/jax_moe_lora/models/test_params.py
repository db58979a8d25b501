"""Random parameters begin as a model's do: norms at one, biases at zero, matrices small."""

import jax
import numpy as np
import pytest

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models.params import init_params
from jax_moe_lora.models.specs.model import ModelConfig


@pytest.mark.slow
def test_random_biases_are_zero_and_norms_are_one():
    moe = MoEConfig(8, 8, 8, 2, expert_bias=True)  # each shape compiles once: few of them
    biases = {"attention_biases": "qkvo", "qk_norm": "projection", "shared_expert_width": 8}
    config = ModelConfig("any", 8, 1, 8, 2, 2, 4, 8, moe, (True,), **biases)
    leaves, _ = jax.tree.flatten_with_path(init_params(config, jax.random.key(0), "float32"))
    values = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    constant = {name: leaf.flat[0].item() for name, leaf in values.items() if np.ptp(leaf) == 0}
    layer = ".layers[0]"
    attention = {f"{layer}.attention.{m}_bias": 0 for m in "qkvo"} | {f"{layer}.attention.{m}_norm": 1 for m in "qk"}
    experts = {f"{layer}.mlp.experts.{m}_bias": 0 for m in ("gate", "up", "down")}
    norms = {f"{layer}.attention_norm": 1, f"{layer}.mlp_norm": 1, ".norm": 1}
    assert constant == attention | experts | norms
    drawn = np.concatenate([leaf.ravel() for name, leaf in values.items() if name not in constant])
    assert 0.015 < drawn.std() < 0.025
