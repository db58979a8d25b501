"""Rotary frequencies of every scaling and parameter against transformers, which defines what checkpoints mean."""

from typing import Any

import numpy as np
import pytest

from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.rope import frequencies
from jax_moe_lora.models.rope_config import read_rope

pytestmark = pytest.mark.parity
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": YARN,
    "yarn-betas": {**YARN, "beta_fast": 8.0, "beta_slow": 0.5},
    "yarn-not-truncated": {**YARN, "truncate": False},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.25},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.4},
    "yarn-mscale-alone": {**YARN, "mscale": 0.7},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_frequencies_and_attention_factor_are_those_of_transformers(scaling, theta):
    from transformers import Qwen3MoeConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**scaling, "rope_theta": theta}
    theirs = Qwen3MoeConfig(head_dim=32, max_position_embeddings=256, rope_parameters=dict(parameters))
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu")
    config = read_rope(Fields({"rope_parameters": parameters}, "config.json"), 256, default_theta=1e4)
    actual, factor = frequencies(config, 32)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6)
    assert factor == pytest.approx(expected_factor, rel=1e-6)
    plain = 1 / theta ** (np.arange(0, 32, 2) / 32)
    assert not np.allclose(actual, plain, rtol=1e-3), "the scaling changes nothing"
