"""Gradients through latent attention and routers of groups are those of PEFT's model under torch."""

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
from support.networks import EXPERTS, load_peft, save_model, save_random_adapter, tiny

pytestmark = [pytest.mark.parity, pytest.mark.slow(30)]

LENGTHS = (9, 14)
PROJECTIONS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def test_gradients_of_packed_examples_equal_those_of_each_alone(tmp_path):
    import torch

    base = save_model(tiny("deepseek_v3"), tmp_path / "model")
    adapter = {"r": 5, "target_modules": PROJECTIONS, "target_parameters": ["mlp.gate.weight", *EXPERTS]}
    path = save_random_adapter(base, tmp_path / "adapter", **adapter)
    config = read_model_config(base)
    sites, names = layer_sites(config), adapter_names(config)
    examples = [np.random.default_rng(seed).integers(0, config.vocab_size, n) for seed, n in enumerate(LENGTHS)]
    wanted = np.random.default_rng(9).standard_normal((sum(LENGTHS), config.vocab_size)).astype(np.float32)

    network = load_peft(base, path)
    matrices = {name: matrix for name, matrix in network.named_parameters() if "lora_" in name}
    for matrix in matrices.values():
        matrix.requires_grad_(True)
    logits = torch.cat([network(torch.tensor(tokens[None]), use_cache=False).logits[0] for tokens in examples])
    (logits * torch.tensor(wanted)).sum().backward()
    with torch.no_grad():  # in the place of the matrices, so that one reader finds both
        for matrix in matrices.values():
            matrix.copy_(matrix.grad)
    network.save_pretrained(tmp_path / "gradients")

    params, spec = from_adapter(read_adapter(path, sites, names), sites)
    expected, _ = from_adapter(read_adapter(tmp_path / "gradients", sites, names), sites)
    model = load_params(base, config, "float32")
    tokens = jnp.asarray(np.concatenate(examples))[None]
    positions = jnp.concatenate([jnp.arange(n) for n in LENGTHS])[None]
    segments = jnp.concatenate([jnp.full(n, place + 1) for place, n in enumerate(LENGTHS)])[None]

    @jax.jit
    @jax.grad
    def gradient(params):
        bank = training_bank({"adapter": params}, {"adapter": spec}, sites, config.num_layers)
        slots = jnp.zeros(tokens.shape, jnp.int32)
        rows = decoder.packed_logits(model, bank, tokens, positions, segments, slots, config=config)
        return (rows[0] * jnp.asarray(wanted)).sum()

    found = gradient(params)
    assert {*found} == {*expected}
    for key, values in expected.items():
        assert np.linalg.norm(values) > 0, key
        assert_close(np.asarray(found[key]), np.asarray(values), 1e-4)
