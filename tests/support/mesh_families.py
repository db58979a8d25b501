"""One layer of families whose blocks differ, on one device and on a mesh: a prompt, and a step where it differs."""

import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora.adapters import bank as banks
from jax_moe_lora.mesh.rules import parse_mesh
from jax_moe_lora.mesh.steps import over_mesh
from jax_moe_lora.models import decoder
from jax_moe_lora.models.families.examples import example
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.models.specs.mla import MLA
from jax_moe_lora.models.specs.model import ModelConfig
from support.meshes import make_model, predicted_bytes, random_adapter, random_params, relative, report, summed_bytes

SLOTS = jnp.array([-1, 0, 0, -1], jnp.int32)
TOKENS = np.random.default_rng(1).integers(0, 64, (4, 6)).astype(np.int32)
LENGTHS = jnp.array([6, 5, 6, 2], jnp.int32)


def one_layer(name: str) -> ModelConfig:
    config = family(name, "config.json", {}).read_config(example(name), None, "config.json")
    return replace(config, layers=(config.layers[config.routed_layers[0]],))


def logits(config: ModelConfig, mesh: str | None) -> tuple[np.ndarray, list[int]]:
    """Of a prompt, or of a step behind one; and the bytes of each sum in the program."""
    model = make_model(config, random_params(config), mesh, max_adapters=1)
    model.load_adapter(random_adapter("per_expert", layer_sites(config), 0, rank=5), "it")
    fn = model.functional(batch=4, max_length=8)
    if steps(config):
        cache, _ = fn.prefill(fn.params, fn.bank, fn.init_cache(), TOKENS, LENGTHS, SLOTS)
        function, arrays = decoder.decode, (cache, jnp.asarray(TOKENS[:, 0]), SLOTS)
    else:
        function, arrays = decoder.logits, (jnp.asarray(TOKENS), LENGTHS, SLOTS)
    step = jax.jit(partial(over_mesh(function, model.mesh), config=config))
    program = step.lower(fn.params, fn.bank, *arrays).compile()
    results = program(fn.params, fn.bank, *arrays)
    if steps(config):
        return np.asarray(results[1]), summed_bytes(program.as_text())
    return np.asarray(results)[np.arange(6)[None, :] < np.asarray(LENGTHS)[:, None]], summed_bytes(program.as_text())


def steps(config: ModelConfig) -> bool:
    """Latent attention is another function in a step."""
    return isinstance(config.layers[0].attention, MLA)


if __name__ == "__main__":
    banks.compile_updates = lambda *_: None  # nothing is counted here
    data = parse_mesh(sys.argv[1])["data"]
    for name in sys.argv[2:]:
        config = one_layer(name)
        there, summed = logits(config, sys.argv[1])
        rows = 4 // data * (1 if steps(config) else 6)
        predicted = predicted_bytes(config, sys.argv[1], rows)
        report(family=name, error=relative(there, logits(config, None)[0]), summed=summed, predicted=predicted)
