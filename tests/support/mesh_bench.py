"""The benchmark of a model on a mesh, whose random bank and weights are such as the library would make."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_moe_lora import InputError
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.benchmark.models import model_config
from jax_moe_lora.benchmark.random_model import make_bank, random_params, sites_of
from jax_moe_lora.cli.bench_model import bench_model
from jax_moe_lora.mesh.rules import make_mesh, param_specs, shardings, split_sites
from jax_moe_lora.models.quantised.schemes import quantised_formats
from jax_moe_lora.models.specs.model import ModelConfig
from pallas_kernels.specs import ADAPTERS
from support.meshes import report


def like_a_real_one(mesh: str) -> bool:
    """Whether a random bank has the arrays of a full one, where they lie, and each page one owner."""
    config, devices = _made(mesh)
    bank: Any = make_bank(config, "s8r16", "all", devices)()
    sites, spec = split_sites(config, sites_of(config, "all"), devices), ADAPTERS["s8r16"]
    real = create_bank(sites, spec.slots, max(spec.ranks), None, mesh=devices)
    alike = [
        (one.shape, one.dtype) == (other.shape, other.dtype) and one.sharding.is_equivalent_to(other.sharding, one.ndim)
        for one, other in zip(jax.tree.leaves(bank), jax.tree.leaves(real), strict=True)
    ]
    owned = []
    for module, site in sites.items():
        table = np.asarray(bank.tables[module])
        slots = np.broadcast_to(np.arange(spec.slots)[None, :, None], table.shape[:3])
        owned += [
            bool((np.asarray(bank.owner[width])[table[..., side]] == slots).all())
            for side, width in enumerate(site.pools)
        ]
    return jax.tree.structure(bank) == jax.tree.structure(real) and all(alike) and all(owned)


def quantised_alike(mesh: str, scheme: str) -> bool:
    """Whether random weights in few bits are those of one device, each array where a real one lies."""
    config, devices = _made(mesh)
    formats = quantised_formats(config, scheme, "tiny")
    one, split = random_params(config, formats), random_params(config, formats, devices)
    places = shardings(param_specs(config, devices, split), devices)
    return jax.tree.structure(one) == jax.tree.structure(split) and all(
        bool((np.asarray(a) == np.asarray(b)).all()) and b.sharding.is_equivalent_to(place, b.ndim)
        for a, b, place in zip(*map(jax.tree.leaves, (one, split, places)), strict=True)
    )


def refused(**sizes: Any) -> str:
    """What is said of a mesh that cuts through a block."""
    try:
        bench_model(model="tiny", decode=[4], mesh="tensor=2", quantise="fp8", **sizes)
    except InputError as error:
        return str(error)
    return ""


def _made(mesh: str) -> tuple[ModelConfig, Mesh]:
    devices = make_mesh(mesh)
    assert devices is not None
    return model_config("tiny", 1), devices


if __name__ == "__main__":
    sys.stdout, out = sys.stderr, sys.stdout
    sizes: dict[str, Any] = {"layers": 1, "adapters": ["s8r16"], "context": 4, "cache_length": 8, "steps": 2}
    file = Path(sys.argv[1]) / "rows.json"
    mesh, *scheme = sys.argv[2:]
    bench_model(
        model="tiny", targets="all", decode=[4], mesh=mesh, quantise=next(iter(scheme), None), out=file, **sizes
    )
    sys.stdout = out
    if scheme:
        report(text=file.read_text(), alike=quantised_alike(mesh, *scheme), refused=refused(**sizes))
    else:
        report(text=file.read_text(), alike=like_a_real_one(mesh))
