"""Lowers a prompt and a decode step over two H200s on a machine without one, a line of JSON for each mesh.

Runs in the environment of `compile_kernels.py`.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from jax_moe_lora.adapters import bank as banks
from jax_moe_lora.adapters.placement import bank_specs
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.mesh.rules import cache_specs, param_specs, rows_spec, split_sites
from jax_moe_lora.mesh.steps import over_mesh
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import abstract_params
from jax_moe_lora.models.sites import layer_sites
from support.compile_kernels import target  # sets the environment before jax is imported
from support.meshes import report
from support.models import decoder_config

MOE = MoEConfig(256, 128, 32, 2)  # as many experts as the kernel of the router takes at least
CONFIG = decoder_config("qwen2_moe", 256, 256, (4, 2, 64), MOE, (True,), shared_width=256)
BATCH, LENGTH = 8, 32


def lowered(mesh: Mesh, kind: str):
    def placed(tree, specs):
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)), tree, specs
        )

    def rows(*shape: int):
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, rows_spec(mesh)))

    with jax.default_device(jax.devices("cpu")[0]):
        bank = banks.create_bank(split_sites(CONFIG, layer_sites(CONFIG), mesh), 4, 16, None, "bfloat16")
    params = placed(abstract_params(CONFIG, "bfloat16"), param_specs(CONFIG, mesh))
    cache = jax.eval_shape(partial(decoder.init_cache, CONFIG, BATCH, LENGTH, "bfloat16"))
    state = params, placed(bank, bank_specs(bank)), placed(cache, cache_specs(CONFIG, mesh, cache))
    step = decoder.decode if kind == "decode" else decoder.prefill
    arguments = (rows(BATCH),) if kind == "decode" else (rows(BATCH, LENGTH), rows(BATCH))
    program = jax.jit(partial(over_mesh(step, mesh), config=CONFIG), donate_argnums=2)
    return program.lower(*state, *arguments, rows(BATCH))


def main() -> None:
    banks.compile_updates = lambda *_: None
    devices = topologies.get_topology_desc(platform="cuda", target_config=target("h200"), topology="1x2x1").devices
    for axis in sys.argv[1:]:
        mesh = Mesh(np.array(devices), (axis,), axis_types=(AxisType.Auto,))
        with jax.default_device(devices[0]):
            for kind in ("prefill", "decode"):
                text = lowered(mesh, kind).as_text()
                report(axis=axis, kind=kind, kernels=text.count("mosaic_gpu"), sums=text.count("stablehlo.all_reduce"))


if __name__ == "__main__":
    main()
