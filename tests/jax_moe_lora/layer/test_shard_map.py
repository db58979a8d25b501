"""The layer under `jax.shard_map` as it comes, with its check of what varies over the mesh: two CPU devices."""

import os
import subprocess
import sys
import textwrap

from support import ROOT

PROGRAM = textwrap.dedent("""
    from functools import partial
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec as P
    from jax_moe_lora.layer.moe import moe_lora
    from support.layers import Spec, draw

    problem = draw(Spec(tokens=10))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, router, slots = jnp.asarray(problem.x), jnp.asarray(problem.router), jnp.asarray(problem.slots, jnp.int32)
    arguments = x, slots, router, problem.experts, problem.bank.layer(0)

    def layer(x, slots, router, experts, adapters, implementation):
        return moe_lora(x, router, experts, problem.spec.config, adapters, slots, implementation=implementation)

    for implementation in ("xla", "reference"):
        whole = partial(layer, implementation=implementation)
        split = jax.shard_map(whole, mesh=mesh, in_specs=(P("data"), P("data"), P(), P(), P()), out_specs=P("data"))
        expected, found = jax.jit(whole)(*arguments), jax.jit(split)(*arguments)
        assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) < 1e-6, implementation
    print("equal")
""")


def test_the_layer_runs_under_shard_map_with_its_default_check():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment = os.environ | flags | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.stdout == "equal\n", run.stderr[-3000:]
