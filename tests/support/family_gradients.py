"""Gradients of an adapter in a family's model, beside torch's of the same adapter in PEFT's model.

class TestGptOss(FamilyTests, GradientTests): ...
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.models import decoder
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.training import from_adapter
from jax_moe_lora.training.loss import token_losses
from jax_moe_lora.training.training_bank import training_bank
from support.family_tests import FAST_COMPILE
from support.layers import assert_close
from support.networks import load_peft

LIMIT = 1e-4
FIRST, SECOND = 13, 22
"""Tokens of two examples that share a row; the window of a tiny model is shorter than both."""


def torch_gradients(base: Path, adapter: Path, examples: list[np.ndarray], folder: Path) -> Path:
    """The gradient of the examples' summed losses as an adapter in a folder: each A and B is its own gradient."""
    import torch

    network: Any = load_peft(base, adapter)
    trained = [weight for name, weight in network.named_parameters() if "lora_" in name]
    for weight in trained:
        weight.requires_grad_(True)
    for tokens in examples:
        logits = network(torch.tensor(tokens[None, :-1]), use_cache=False).logits[0]
        torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum").backward()
    with torch.no_grad():
        for weight in trained:
            assert weight.grad is not None
            weight.copy_(weight.grad)
    network.save_pretrained(folder)
    shutil.copyfile(adapter / "adapter_config.json", folder / "adapter_config.json")
    return folder


class GradientTests:
    """The test has the fixture `served`, whose last adapter is the one that is trained."""

    def test_gradients_of_packed_examples_are_those_of_torch(self, served, tmp_path):
        config = served.model.config
        sites, names = decoder.layer_sites(config), adapter_names(config)
        name, adapter = list(served.paths.items())[-1]
        params, spec = from_adapter(read_adapter(adapter, sites, names), sites)
        examples = [served.tokens[0, : FIRST + 1], served.tokens[1, : SECOND + 1]]
        tokens = np.concatenate([example[:-1] for example in examples])[None]
        targets = np.concatenate([example[1:] for example in examples])[None]
        positions = np.concatenate([np.arange(FIRST), np.arange(SECOND)])[None]
        segments = np.concatenate([np.full(FIRST, 1), np.full(SECOND, 2)])[None]

        @partial(jax.jit, compiler_options=FAST_COMPILE)
        @jax.grad
        def gradients(params):
            bank = training_bank({name: params}, {name: spec}, sites, config.num_layers)
            row = map(jnp.asarray, (tokens, positions, segments, np.zeros_like(tokens)))
            logits = decoder.packed_logits(served.fn.params, bank, *row, config=config)
            return token_losses(logits, jnp.asarray(targets)).sum()

        expected = torch_gradients(served.base, adapter, examples, tmp_path / "gradients")
        theirs, _ = from_adapter(read_adapter(expected, sites, names), sites)
        found = gradients(params)
        assert {*found} == {*theirs}
        for key, values in theirs.items():
            assert np.linalg.norm(values) > 0, key
            assert_close(np.asarray(found[key]), np.asarray(values), LIMIT)
