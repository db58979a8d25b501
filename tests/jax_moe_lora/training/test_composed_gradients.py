"""Gradients through Granite's factors and fused shared expert, and through SparseMixer, are those of PEFT's model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.models import decoder
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.training import from_adapter
from jax_moe_lora.training.training_bank import training_bank
from support.layers import assert_close
from support.networks import ATTENTION, EXPERTS, load_peft, save_model, save_random_adapter, tiny

pytestmark = [pytest.mark.parity, pytest.mark.slow(30)]

LENGTH = 14
GRANITE = [f"block_sparse_moe.{name}" for name in ("experts.gate_up_proj", "experts.down_proj", "router.weight")]
ADAPTERS = {
    "granitemoeshared": {"target_modules": ["input_linear", "output_linear"], "target_parameters": GRANITE},
    "phimoe": {"target_modules": ATTENTION, "target_parameters": [*EXPERTS, "mlp.router.weight"]},
}


@pytest.mark.parametrize("model_type", ADAPTERS)
def test_gradients_are_those_of_peft(model_type, tmp_path):
    """At inference, for SparseMixer: in training transformers draws experts at random."""
    import torch

    base = save_model(tiny(model_type, num_hidden_layers=2), tmp_path / "model")
    path = save_random_adapter(base, tmp_path / "adapter", r=5, **ADAPTERS[model_type])
    config = read_model_config(base)
    sites, names = layer_sites(config), adapter_names(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, LENGTH))
    wanted = np.random.default_rng(9).standard_normal((LENGTH, config.vocab_size)).astype(np.float32)

    network = load_peft(base, path)
    matrices = {name: matrix for name, matrix in network.named_parameters() if "lora_" in name}
    for matrix in matrices.values():
        matrix.requires_grad_(True)
    logits = network(torch.tensor(tokens), use_cache=False).logits[0]
    (logits * torch.tensor(wanted)).sum().backward()
    with torch.no_grad():  # in the place of the matrices, so that one reader finds both
        for matrix in matrices.values():
            matrix.copy_(matrix.grad)
    network.save_pretrained(tmp_path / "gradients")

    params, spec = from_adapter(read_adapter(path, sites, names), sites)
    expected, _ = from_adapter(read_adapter(tmp_path / "gradients", sites, names), sites)
    model = load_params(base, config, "float32")

    @jax.jit
    @jax.grad
    def gradient(params):
        bank = training_bank({"adapter": params}, {"adapter": spec}, sites, config.num_layers)
        positions, ones = jnp.arange(LENGTH)[None], jnp.ones((1, LENGTH), jnp.int32)
        slots = jnp.zeros((1, LENGTH), jnp.int32)
        rows = decoder.packed_logits(model, bank, jnp.asarray(tokens), positions, ones, slots, config=config)
        return (rows[0] * jnp.asarray(wanted)).sum()

    found = gradient(params)
    assert {*found} == {*expected}
    for key, values in expected.items():
        assert np.linalg.norm(values) > 0, key
        assert_close(np.asarray(found[key]), np.asarray(values), 1e-4)
