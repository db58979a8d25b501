"""One layer of families whose blocks differ, on one device and on a mesh: a prompt, and a step where it differs."""

import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from jax_moe_lora.adapters import bank as banks
from jax_moe_lora.models.families.examples import example
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.models.specs.mla import MLA
from jax_moe_lora.models.specs.model import ModelConfig
from support.meshes import make_model, random_adapter, random_params, relative, report

SLOTS = jnp.array([-1, 0, 0, -1], jnp.int32)
TOKENS = np.random.default_rng(1).integers(0, 64, (4, 6)).astype(np.int32)
LENGTHS = jnp.array([6, 5, 6, 2], jnp.int32)


def one_layer(name: str) -> ModelConfig:
    config = family(name, "config.json", {}).read_config(example(name), None, "config.json")
    return replace(config, layers=(config.layers[config.routed_layers[0]],))


def logits(config: ModelConfig, mesh: str | None) -> np.ndarray:
    model = make_model(config, random_params(config), mesh, max_adapters=1)
    model.load_adapter(random_adapter("per_expert", layer_sites(config), 0, rank=5), "it")
    if not isinstance(config.layers[0].attention, MLA):
        return np.asarray(model.logits(TOKENS, [None, "it", "it", None]))
    fn = model.functional(batch=4, max_length=8)  # a step works on latents
    cache, _ = fn.prefill(fn.params, fn.bank, fn.init_cache(), TOKENS, LENGTHS, SLOTS)
    return np.asarray(fn.decode(fn.params, fn.bank, cache, jnp.asarray(TOKENS[:, 0]), SLOTS)[1])


if __name__ == "__main__":
    banks.compile_updates = lambda *_: None  # nothing is counted here
    for name in sys.argv[2:]:
        config = one_layer(name)
        report(family=name, error=relative(logits(config, sys.argv[1]), logits(config, None)))
