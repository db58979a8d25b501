"""The benchmark of a model on a mesh, whose random bank is one that the library would make."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.benchmark.models import model_config
from jax_moe_lora.benchmark.random_model import make_bank, sites_of
from jax_moe_lora.cli.bench_model import bench_model
from jax_moe_lora.mesh.rules import make_mesh, split_sites
from pallas_kernels.specs import ADAPTERS
from support.meshes import report


def like_a_real_one(mesh: str) -> bool:
    """Whether a random bank has the arrays of a full one, where they lie, and each page one owner."""
    config, devices = model_config("tiny", 1), make_mesh(mesh)
    assert devices is not None
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


if __name__ == "__main__":
    sys.stdout, out = sys.stderr, sys.stdout
    sizes: dict[str, Any] = {"layers": 1, "adapters": ["s8r16"], "context": 4, "cache_length": 8, "steps": 2}
    file = Path(sys.argv[1]) / "rows.json"
    bench_model(model="tiny", targets="all", decode=[4], mesh=sys.argv[2], out=file, **sizes)
    sys.stdout = out
    report(text=file.read_text(), alike=like_a_real_one(sys.argv[2]))
