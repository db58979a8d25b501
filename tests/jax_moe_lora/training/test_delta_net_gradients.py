"""Gradients through gated delta-net: rows of several examples, beside PEFT on each example alone."""

import warnings

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
from support.networks import EXPERTS, load_model, save_model, tiny

pytestmark = [pytest.mark.parity, pytest.mark.slow(30)]

# The second one crosses the border of a chunk.
EXAMPLES = (21, 70)
WIDTH = 96
TARGETS = ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "o_proj"]


def test_gradients_of_packed_rows_are_those_of_peft_on_each_example(tmp_path):
    import peft
    import torch
    from torch.nn import functional

    types = ["linear_attention", "full_attention"]
    base = save_model(tiny("qwen3_next", num_hidden_layers=2, layer_types=types), tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = peft.get_peft_model(
            load_model(base), peft.LoraConfig(r=3, target_modules=TARGETS, target_parameters=EXPERTS)
        )
    matrices = [parameter for name, parameter in network.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for matrix in matrices:
            matrix.normal_(0, 0.1)
    network.save_pretrained(tmp_path / "adapter")
    config = read_model_config(base)
    random = np.random.default_rng(0)
    examples = [random.integers(0, config.vocab_size, count + 1) for count in EXAMPLES]
    for example in examples:
        tokens = torch.tensor(example[None])
        logits = network(tokens[:, :-1], use_cache=False).logits
        functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").backward()
    with torch.no_grad():
        for matrix in matrices:
            matrix.copy_(matrix.grad)
    network.save_pretrained(tmp_path / "gradients")

    sites, names = layer_sites(config), adapter_names(config)
    params, spec = from_adapter(read_adapter(tmp_path / "adapter", sites, names), sites)
    expected, _ = from_adapter(read_adapter(tmp_path / "gradients", sites, names), sites)
    rows = np.zeros((4, 1, WIDTH), np.int32)
    place = 0
    for number, example in enumerate(examples, 1):
        here = slice(place, place + len(example) - 1)
        count = len(example) - 1
        rows[:, 0, here] = example[:-1], np.arange(count), np.full(count, number), example[1:]
        place = here.stop
    weights = load_params(base, config, "float32")

    @jax.jit
    def gradients(params, tokens, positions, segments, targets):
        def loss(params):
            bank = training_bank({"peft": params}, {"peft": spec}, sites, config.num_layers)
            inputs = tokens, positions, segments, jnp.where(segments > 0, 0, -1)
            scores = jax.nn.log_softmax(decoder.packed_logits(weights, bank, *inputs, config=config))
            chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
            return -jnp.where(segments > 0, chosen, 0.0).sum()

        return jax.grad(loss)(params)

    found = gradients(params, *map(jnp.asarray, rows))
    assert {*found} == {*expected}
    for key, values in expected.items():
        assert_close(np.asarray(found[key]), np.asarray(values), 1e-4)
