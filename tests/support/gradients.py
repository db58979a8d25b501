"""The layer's gradients for tests: a loss, and the same in plain jnp, whose autodiff is the definition."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora.layer.moe import routed_experts
from pallas_kernels.ops import LayerPages
from pallas_kernels.routed_experts.weights import ExpertWeights
from support.paged import PagedLayer, PagedSpec

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
Arguments = tuple[jax.Array, jax.Array, ExpertWeights, dict[int, jax.Array]]


def arguments(layer: PagedLayer) -> Arguments:
    """x, router weights, experts and the pools by width."""
    return layer.x, layer.gates, layer.experts, {pool.shape[2]: pool for pool in layer.adapters.pools.values()}


def with_pools(layer: PagedLayer, pools: dict[int, jax.Array]) -> LayerPages:
    return replace(layer.adapters, pools={name: pools[pool.shape[2]] for name, pool in layer.adapters.pools.items()})


def loss(layer: PagedLayer, implementation: str, remat: bool, x, gates, experts, pools) -> jax.Array:
    adapters = with_pools(layer, pools)
    y = routed_experts(x, gates, layer.chosen, experts, layer.config, adapters, layer.slots, implementation, remat)
    return (y.astype(jnp.float32) * cotangent(y.shape)).sum()


def cotangent(shape: tuple[int, ...]) -> jax.Array:
    """Of values that every dtype holds exactly."""
    return jax.random.randint(jax.random.key(5), shape, -8, 9).astype(jnp.float32) / 8


def plain(layer: PagedLayer, x, gates, experts, pools) -> jax.Array:
    """The same loss in plain jnp, expert by expert over all tokens; a pair whose expert is out of range is skipped."""

    def linear(module: str, rows: jax.Array, expert: jax.Array) -> jax.Array:
        pages, slot = layer.adapters[module], jnp.maximum(layer.slots, 0)
        y = rows @ getattr(experts, module)[expert].T
        table, scale = pages.table[slot, expert], pages.scale[slot, expert][:, None]
        for page in range(-(-pages.max_rank // 16)):
            live = (layer.slots >= 0) & (page < table[:, 2])
            a, b = (
                jnp.where(live[:, None, None], pools[width][jnp.where(live, table[:, column] + page, 0)], 0)
                for column, width in enumerate((pages.a.shape[2], pages.b.shape[2]))
            )
            y = y + scale * jnp.einsum("tro,tr->to", b, jnp.einsum("tri,ti->tr", a, rows))
        return y

    @jax.checkpoint
    def add(y: jax.Array, expert: jax.Array) -> tuple[jax.Array, None]:
        share = jnp.where(layer.chosen == expert, gates, 0).sum(1)
        gated = jax.nn.silu(linear("gate", x, expert)) * linear("up", x, expert)
        return y + share[:, None] * linear("down", gated, expert), None

    y, _ = jax.lax.scan(add, jnp.zeros_like(x), jnp.arange(layer.spec.experts))
    return (y * cotangent(y.shape)).sum()


Routing = tuple[jax.Array, jax.Array, LayerPages]


def routing(layer: PagedLayer) -> Routing:
    """What the gradients depend on beside `arguments`."""
    return layer.chosen, layer.slots, layer.adapters


@partial(jax.jit, static_argnums=(0, 1, 2))
def layer_gradients(spec: PagedSpec, implementation: str, remat: bool, routing: Routing, arguments: Arguments):
    """Gradients of `loss` by all arguments; layers of one shape run one program."""
    return jax.grad(partial(loss, _with_routing(spec, routing), implementation, remat), (0, 1, 2, 3))(*arguments)


@partial(jax.jit, static_argnums=0)
def plain_gradients(spec: PagedSpec, routing: Routing, arguments: Arguments):
    """Gradients of `plain` by all arguments."""
    return jax.grad(partial(plain, _with_routing(spec, routing)), (0, 1, 2, 3))(*arguments)


def _with_routing(spec: PagedSpec, routing: Routing) -> PagedLayer:
    chosen, slots, adapters = routing
    unused = jnp.zeros(())
    return PagedLayer(spec, unused, unused, chosen, slots, None, adapters, {})


def assert_gradients(found, expected, tolerance: float) -> None:
    names = jax.tree_util.tree_leaves_with_path(expected)
    for (path, want), got in zip(names, jax.tree.leaves(found), strict=True):
        want, got = np.nan_to_num(np.asarray(want, np.float64)), np.asarray(got, np.float64)
        where = jax.tree_util.keystr(path)
        assert np.isfinite(got).all(), where
        error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
        assert error <= tolerance, f"{where}: relative error {error:.1e}, at most {tolerance} was expected"
