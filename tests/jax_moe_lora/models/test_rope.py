"""Rotary frequencies of every scaling and parameter against transformers, which defines what checkpoints mean."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.rope import frequencies, rotate
from jax_moe_lora.models.rope_config import read_rope

pytestmark = [pytest.mark.parity, pytest.mark.optimised]
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


@pytest.mark.parametrize(("share", "turned"), [(0.5, 16), (0.25, 8), (1.0, None)])
def test_a_share_of_a_head_is_turned_and_the_rest_passes(share, turned):
    fields = Fields({"rope_theta": 1e4, "partial_rotary_factor": share}, "config.json")
    config = read_rope(fields, 256, default_theta=1e6, head_dim=32)
    assert config.rotary_dim == turned
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 32)), jnp.float32)
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    y, width = rotate(x, positions, config), turned or 32
    assert (y[..., width:] == x[..., width:]).all()
    np.testing.assert_array_equal(y[..., :width], rotate(x[..., :width], positions, RopeConfig(theta=1e4)))


@pytest.mark.parametrize("share", [0.3, 0.0, 1.5])
def test_a_share_that_turns_no_even_number_of_dimensions_is_refused(share):
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        read_rope(Fields({"partial_rotary_factor": share}, "config.json"), 256, 1e4, head_dim=10)


def test_a_share_in_a_family_that_turns_whole_heads_is_refused():
    fields = Fields({"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}}, "config.json")
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        read_rope(fields, 256, 1e4)


def test_interleaved_pairs_are_the_halves_of_a_permuted_head():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 16)), jnp.float32)
    positions, order = jnp.arange(5, dtype=jnp.int32)[None], np.r_[0:16:2, 1:16:2]
    y = rotate(x, positions, RopeConfig(interleaved=True))
    np.testing.assert_array_equal(y[..., order], rotate(x[..., order], positions, RopeConfig()))


def test_proportional_frequencies_are_those_of_transformers():
    from transformers import Gemma4TextConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = Gemma4TextConfig(head_dim=16, global_head_dim=32, hidden_size_per_layer_input=0)
    expected, _ = ROPE_INIT_FUNCTIONS["proportional"](theirs, "cpu", layer_type="full_attention")
    actual, factor = frequencies(RopeConfig(theta=1e6, kind="proportional", rotary_dim=8), 32)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6)
    assert factor == 1.0
    assert (actual > 0).sum() == 4
