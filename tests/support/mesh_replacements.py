"""Whole embeddings and heads on one device and on a mesh: logits of a mixed batch, and loading without compiling."""

import sys
from dataclasses import replace

import jax
import numpy as np

from jax_moe_lora import Model
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.mesh.rules import make_mesh, param_specs, shardings, split_sites
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.tools.compilations import count_compilations
from support.meshes import random_adapter, random_params, relative, report
from support.models import decoder_config

CONFIG = decoder_config("qwen3_moe", 37, 16, (2, 2, 8), MoEConfig(16, 16, 4, 2), (True,))
TOKENS = np.random.default_rng(0).integers(0, 37, (6, 4)).astype(np.int32)
NAMES = [None, "both", "head", "both", None, "head"]


def adapter(seed: int, *modules: str) -> LoRAAdapter:
    rng = np.random.default_rng(seed)
    matrices = {module: rng.normal(size=(37, 16)).astype(np.float32) for module in modules}
    return replace(random_adapter("fused", layer_sites(CONFIG), seed, rank=4), replacements=matrices)


def load(mesh: str | None) -> Model:
    devices, sites, params = make_mesh(mesh), layer_sites(CONFIG), random_params(CONFIG)
    if devices is not None:
        sites = split_sites(CONFIG, sites, devices)
    placement = None if devices is None else shardings(param_specs(CONFIG, devices), devices)
    bank = create_bank(sites, 2, 16, None, "float32", 3, (37, 16), devices)
    model = Model(CONFIG, jax.device_put(params, placement), bank, mesh=devices)
    model.load_adapter(adapter(0, "embedding", "head"), "both")
    model.load_adapter(adapter(1, "head"), "head")
    return model


if __name__ == "__main__":
    one, split = load(None), load(sys.argv[1])
    wanted, found = one.logits(TOKENS, NAMES), np.asarray(split.logits(TOKENS, NAMES))
    with count_compilations() as count:
        split.unload_adapter("both")
        split.load_adapter(adapter(0, "embedding", "head"), "both")
        again = np.asarray(split.logits(TOKENS, NAMES))
    base = np.asarray(split.logits(TOKENS, [None] * 6))
    report(
        error=relative(found, wanted),
        same_after_reloading=bool((again == found).all()),
        compilations=count.compilations,
        base_is_exact=bool((base[[0, 4]] == found[[0, 4]]).all()),
        matter=relative(base[1:4], found[1:4]),
    )
