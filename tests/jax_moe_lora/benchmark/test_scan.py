"""What the benchmark of scanned layers times computes what the unrolled layers do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.benchmark.scan import scanned_logits
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import init_params
from support.models import decoder_config


@pytest.mark.slow
def test_scanned_layers_give_the_logits_of_unrolled_ones():
    moe = MoEConfig(16, 8, 4, 2, renormalize=True)
    config = decoder_config("qwen3_moe", 32, 16, (2, 1, 8), moe, (True, True))
    params = init_params(config, jax.random.key(0), "float32")
    bank = create_bank(decoder.layer_sites(config), 2, 16, None, "float32")
    arguments = jnp.arange(6).reshape(2, 3), jnp.full(2, 3), jnp.array([0, 1])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params.layers)
    scanned = scanned_logits(params, stacked, bank, *arguments, config=config)
    np.testing.assert_allclose(scanned, decoder.logits(params, bank, *arguments, config=config), rtol=1e-5, atol=1e-6)
