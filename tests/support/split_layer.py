"""One layer, whole and split by tokens over a mesh: the results and the gradients of everything are compared."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_moe_lora.layer.moe import moe_lora
from support.layers import Spec, draw


def assert_split_equals_whole(implementation: str, dtype: str, devices: int, limit: float) -> None:
    """Relative Frobenius error of the output and of each gradient."""
    problem = draw(Spec(tokens=16, hidden=128, width=64, dtype=dtype))
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    bank = problem.bank.layer(0)
    experts = jax.tree.map(lambda weights: jnp.asarray(weights, dtype), problem.experts)
    arguments = jnp.asarray(problem.x, dtype), jnp.asarray(problem.router, dtype), experts, bank
    slots = jnp.asarray(problem.slots, jnp.int32)
    specs = P("data"), P("data"), P(), P(), P()

    def layer(slots, x, router, experts, adapters):
        return moe_lora(x, router, experts, problem.spec.config, adapters, slots, implementation=implementation)

    def loss(slots, *arguments):
        return jnp.sin(layer(slots, *arguments).astype(jnp.float32)).sum()

    def split_loss(*arguments):
        return jax.lax.psum(loss(*arguments), "data")

    over_mesh = partial(jax.shard_map, mesh=mesh, in_specs=specs)
    gradients = partial(jax.grad, argnums=(1, 2, 3, 4), allow_int=True)
    whole = jax.jit(layer)(slots, *arguments), jax.jit(gradients(loss))(slots, *arguments)
    split = (
        jax.jit(over_mesh(layer, out_specs=P("data")))(slots, *arguments),
        jax.jit(gradients(over_mesh(split_loss, out_specs=P())))(slots, *arguments),
    )
    for (path, expected), actual in zip(jax.tree.leaves_with_path(whole), jax.tree.leaves(split), strict=True):
        if expected.dtype == jax.dtypes.float0:
            continue
        expected, actual = expected.astype(jnp.float32), actual.astype(jnp.float32)
        error = float(jnp.linalg.norm(actual - expected) / jnp.maximum(jnp.linalg.norm(expected), 1e-30))
        assert error < limit, f"{implementation} {jax.tree_util.keystr(path)}: {error}"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        assert_split_equals_whole(name, "float32", len(jax.devices()), limit=1e-5)
    print("equal")
