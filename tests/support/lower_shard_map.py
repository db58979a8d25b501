"""Lowers a layer and its gradient under `jax.shard_map` for two H200s on a machine without one, a line of JSON each.

Runs in the environment of `compile_kernels.py`.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_moe_lora.layer.moe import moe_lora
from support.compile_kernels import target  # sets the environment before jax is imported
from support.layers import Spec, draw

SPECS = P("data"), P(), P(), P(), P("data")


def main() -> None:
    devices = topologies.get_topology_desc(platform="cuda", target_config=target("h200"), topology="1x2x1").devices
    mesh = Mesh(np.array(devices), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    problem = draw(Spec(tokens=16, hidden=128, width=128, experts=32, dtype="bfloat16"))

    def shape(sharding: P, tree, dtype=None):
        placed = NamedSharding(mesh, sharding)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=placed), tree)

    trees = problem.x, problem.router, problem.experts, problem.bank.layer(0), np.asarray(problem.slots)
    dtypes = jnp.bfloat16, jnp.bfloat16, jnp.bfloat16, None, jnp.int32
    arguments = [shape(*argument) for argument in zip(SPECS, trees, dtypes, strict=True)]

    def layer(x, router, experts, adapters, slots, implementation):
        return moe_lora(x, router, experts, problem.spec.config, adapters, slots, implementation=implementation)

    def loss(*arguments, implementation):
        return jax.lax.psum(layer(*arguments, implementation).astype(jnp.float32).sum(), "data")

    with jax.default_device(devices[0]):
        for name in ("hopper", "portable"):
            forward = jax.shard_map(partial(layer, implementation=name), mesh=mesh, in_specs=SPECS, out_specs=P("data"))
            total = jax.shard_map(partial(loss, implementation=name), mesh=mesh, in_specs=SPECS, out_specs=P())
            gradient = jax.grad(total, argnums=(0, 1, 2, 3), allow_int=True)
            texts = [jax.jit(f).lower(*arguments).as_text() for f in (forward, gradient)]
            print(json.dumps({"backend": name, "kernels": [text.count("mosaic_gpu") for text in texts]}))


if __name__ == "__main__":
    main()
