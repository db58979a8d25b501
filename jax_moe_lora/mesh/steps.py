"""The decoder's steps over a mesh: each device runs the same functions on the parts of the arrays that it has."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.adapters.placement import bank_specs, local_bank
from jax_moe_lora.mesh.processes import across
from jax_moe_lora.mesh.rules import DATA_AXIS, cache_specs, param_specs, parts, rows_spec, shardings
from jax_moe_lora.models import cache as caches
from jax_moe_lora.models.cache import Cache
from jax_moe_lora.models.specs.model import ModelConfig

Step = Callable[..., Any]


def over_mesh(step: Step, mesh: Mesh | None) -> Step:
    """A step of the decoder whose arrays are split over a mesh.

    Its first argument are parameters, then come bank and cache, where it has one, and arrays of a row per request. It
    gives a cache and such arrays, or arrays alone.

    Args:
      step: a function of `models.decoder`.
      mesh: the devices; None gives the step itself.
    """
    if mesh is None:
        return step

    def call(params: Any, bank: Any, *arrays: Any, config: ModelConfig, **static: Any) -> Any:
        count = jax.tree.leaves(arrays)[0].shape[0]
        unused = -count % parts(mesh, DATA_AXIS)
        arrays = _with_unused_rows(arrays, unused)
        cache = next((array for array in arrays if isinstance(array, Cache)), None)
        rows = rows_spec(mesh)
        of_cache = rows if cache is None else cache_specs(config, mesh, cache)
        in_specs = (
            param_specs(config, mesh, params),
            P() if bank is None else bank_specs(bank),
            *(of_cache if array is cache else rows for array in arrays),
        )
        local = partial(_on_one_device, partial(step, config=config, **static))
        split = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(of_cache, rows))
        kept, others = _without_unused_rows(split(params, bank, *arrays), count, unused)
        return others if kept is None else (kept, *others)

    return call


def _on_one_device(step: Step, params: Any, bank: Any, *arrays: Any) -> tuple[Cache | None, Any]:
    """The step on the parts that one device has; its cache apart from what else it gives."""
    results = step(params, local_bank(bank) if isinstance(bank, AdapterBank) else bank, *arrays)
    has_cache = isinstance(results, tuple) and isinstance(results[0], Cache)
    return (results[0], results[1:]) if has_cache else (None, results)


def _with_unused_rows(arrays: Any, unused: int) -> Any:
    """Arrays with rows of no request behind their own, so that each part of the `data` axis has as many."""
    if not unused:
        return arrays
    return jax.tree.map(lambda rows: jnp.pad(rows, [(0, unused)] + [(0, 0)] * (rows.ndim - 1)), arrays)


def _without_unused_rows(arrays: Any, count: int, unused: int) -> Any:
    """Arrays with a row per request, or per token of each, without those of no request."""
    if not unused:
        return arrays
    return jax.tree.map(lambda rows: rows[: rows.shape[0] * count // (count + unused)], arrays)


def init_cache(
    config: ModelConfig, batch: int, max_length: int, dtype: jax.typing.DTypeLike, mesh: Mesh | None = None
) -> Cache:
    """An empty cache, of which each device of a mesh gets its part.

    Args:
      config: the model's.
      batch: B, a multiple of the mesh's `data`.
      max_length: M, prompt and answer together.
      dtype: of keys and values.
      mesh: the devices; None for the default one.
    """
    if mesh is None:
        return caches.init_cache(config, batch, max_length, dtype)
    shapes = jax.eval_shape(partial(caches.init_cache, config, batch, max_length, dtype))
    placements = shardings(cache_specs(config, mesh, shapes), mesh)
    return jax.tree.map(lambda leaf, place: jnp.zeros(leaf.shape, leaf.dtype, device=place), shapes, placements)


def split_cache(cache: Cache, config: ModelConfig, mesh: Mesh | None) -> Cache:
    """Inside of `jit`: a cache that is split as `init_cache` splits it, so that the next step finds it so.

    Args:
      cache: the cache.
      config: the model's.
      mesh: the devices; None gives the cache itself.
    """
    if mesh is None:
        return cache
    return jax.lax.with_sharding_constraint(cache, shardings(cache_specs(config, mesh, cache), mesh))


def row_multiple(mesh: Mesh | None) -> int:
    """What the rows of a batch are a multiple of."""
    return 1 if mesh is None else parts(mesh, DATA_AXIS)


def reachable[Tree](tree: Tree, mesh: Mesh | None) -> Tree:
    """Inside of `jit`: results that every process has as a whole, where the mesh has several processes.

    Args:
      tree: the arrays.
      mesh: the devices; of one process, or None, the tree stays as it is.
    """
    return on_all_devices(tree, mesh) if across(mesh) else tree


def on_all_devices[Tree](tree: Tree, mesh: Mesh | None) -> Tree:
    """Inside of `jit`: arrays that every device has as a whole, so that what follows always finds them alike.

    Args:
      tree: the arrays.
      mesh: the devices; None gives the tree itself.
    """
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))
