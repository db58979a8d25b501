"""A whole model and adapters of random numbers, made on the device.

Weights and pages are drawn piece by piece: the host never holds anything of a model's size, and the device never holds
more than one matrix twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.bank import RESERVED, AdapterBank
from jax_moe_lora.adapters.bank_sizes import regions_of
from jax_moe_lora.adapters.lora import EXPERT_MODULES, PoolWidth, Site
from jax_moe_lora.adapters.placement import pool_spec, tables_spec
from jax_moe_lora.errors import InputError
from jax_moe_lora.mesh.rules import param_specs, shardings, split_sites
from jax_moe_lora.mesh.scaling.costs import Step
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import ModelParams, abstract_params, init_params
from jax_moe_lora.models.quantised.for_kernels import packed_shapes
from jax_moe_lora.models.quantised.quantising import quantise_leaf
from jax_moe_lora.models.specs.model import ModelConfig
from pallas_kernels.ops import BASE_SLOT, RANK_PAGE, Format, Implementation, Quantised
from pallas_kernels.quantised.split import split_specs
from pallas_kernels.specs import ADAPTERS, AdapterMix

DTYPE = "bfloat16"
FILL_PAGES = 4096  # drawn at a time


@dataclass(frozen=True)
class Case(Step):
    """One thing to time.

    Attributes:
      max_length: positions of the cache.
      adapters: a set of adapters in `specs.ADAPTERS`.
    """

    max_length: int
    adapters: str


def sites_of(config: ModelConfig, targets: str) -> dict[str, Site]:
    """The modules with adapters.

    Args:
      config: the model.
      targets: `experts` (the routed experts) or `all`.

    Returns:
      module -> site.

    Raises:
      InputError: `targets` is unknown.
    """
    if targets not in ("experts", "all"):
        raise InputError(f"targets is {targets!r}; expected experts or all.")
    sites = decoder.layer_sites(config)
    return sites if targets == "all" else {module: sites[module] for module in EXPERT_MODULES}


def random_params(config: ModelConfig, formats: Mapping[str, Format], mesh: Mesh | None = None) -> ModelParams:
    """The model's weights, each quantised before the next is made, in rows.

    Args:
      config: the model.
      formats: of quantised weights, path -> format.
      mesh: the devices that they are split over; None for the default one.
    """
    places = None if mesh is None else shardings(param_specs(config, mesh), mesh)
    return init_params(config, jax.random.key(0), DTYPE, places, partial(_quantised, formats, mesh))


def _quantised(formats: Mapping[str, Format], mesh: Mesh | None, path: str, leaf: Array) -> Array | Quantised:
    """An array, or what it is quantised to; on a mesh, scales lie where the rows and columns do that they scale."""
    few = quantise_leaf(formats, path, leaf)
    if mesh is None or not isinstance(few, Quantised):
        return few
    assert isinstance(leaf.sharding, NamedSharding)
    return jax.device_put(few, shardings(split_specs(few, leaf.sharding.spec), mesh))


def param_shapes(
    config: ModelConfig,
    formats: Mapping[str, Format],
    implementation: Implementation | None = None,
    mesh: Mesh | None = None,
) -> ModelParams:
    """The shapes of random weights whose experts are packed as a loaded model's, and where they lie.

    Args:
      config: the model.
      formats: of quantised weights, path -> format.
      implementation: a backend by name; None picks the best one.
      mesh: the devices that they are split over; None for the default one.
    """

    def placed(params: ModelParams) -> ModelParams:
        if mesh is None:
            return params
        places = shardings(param_specs(config, mesh, params), mesh)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), params, places)

    if not formats:
        return placed(abstract_params(config, DTYPE))
    rows = placed(jax.eval_shape(partial(random_params, config, formats)))
    return placed(replace(rows, layers=packed_shapes(rows.layers, DTYPE, implementation)))


def make_bank(
    config: ModelConfig, adapters: str, targets: str, mesh: Mesh | None = None
) -> Callable[[], AdapterBank | None]:
    """A function that makes a bank.

    Args:
      config: the model.
      adapters: a set of adapters in `specs.ADAPTERS`.
      targets: the modules with adapters, see `sites_of`.
      mesh: the devices that it is split over; None for the default one.

    Returns:
      The function; it returns None if the set is empty.
    """
    spec, sites = ADAPTERS[adapters], sites_of(config, targets)
    if mesh is not None:
        sites = split_sites(config, sites, mesh)
    return partial(random_bank, sites, spec, mesh=mesh) if spec.slots else lambda: None


def random_bank(sites: dict[str, Site], spec: AdapterMix, dtype: str = DTYPE, mesh: Mesh | None = None) -> AdapterBank:
    """A full bank of random per-expert adapters.

    Args:
      sites: the modules with adapters.
      spec: number of slots, and the ranks that they take in turn, rounded up to whole pages.
      dtype: of the pages.
      mesh: the devices that it is split over, whose regions all look alike; None for the default one.

    Returns:
      The bank.
    """
    counts = np.resize(-(-np.asarray(spec.ranks, np.int32) // RANK_PAGE), spec.slots)
    owners: dict[PoolWidth, list[np.ndarray]] = {}  # width -> the slot of each page of a region
    tables: dict[str, Any] = {}
    scales: dict[str, Any] = {}
    for module, site in sites.items():
        shape = (len(site.layers), spec.slots, site.num_experts // site.regions)
        pages = np.broadcast_to(counts[None, :, None], shape)
        slots = np.repeat(np.broadcast_to(np.arange(spec.slots)[None, :, None], shape), pages.reshape(-1))
        within = (np.cumsum(pages) - pages.reshape(-1)).reshape(shape)
        first = []
        for width in site.pools:
            owner = owners.setdefault(width, [np.full(1, RESERVED)])
            first.append(sum(map(len, owner)) + within)
            owner.append(slots)
        tables[module] = np.stack([*first, pages, pages * RANK_PAGE], -1).astype(np.int32)
        scales[module] = np.full((*shape[:2], site.num_experts), 0.5, np.float32)
    sizes = {width: sum(map(len, owner)) for width, owner in owners.items()}
    owner_of_page = tuple(
        jnp.asarray(np.tile(np.concatenate(owner), regions_of(width)), jnp.int32) for width, owner in owners.items()
    )
    pools = tuple(
        _random_pool(width, ids.shape[0], dtype, mesh) for width, ids in zip(owners, owner_of_page, strict=True)
    )
    for module, site in sites.items():
        place = None if mesh is None else NamedSharding(mesh, tables_spec(site))
        step = np.array([*(sizes[width] for width in site.pools), 0, 0], np.int32)
        regions = [tables[module] + region * step for region in range(site.regions)]
        tables[module] = jax.device_put(np.concatenate(regions, axis=2), place)
        scales[module] = jax.device_put(scales[module], place)
    largest = int(counts.max()) * RANK_PAGE
    return AdapterBank(pools, owner_of_page, tables, scales, tuple(owners), tuple(sites.items()), largest)


def _random_pool(width: PoolWidth, count: int, dtype: str, mesh: Mesh | None) -> Float[Array, "N 16 width"]:
    if mesh is not None:
        return _random_parts(width, count, dtype, mesh)
    width = int(width)
    pool = jnp.zeros((count, RANK_PAGE, width), dtype)
    for first in range(0, count, FILL_PAGES):
        pool = _fill(pool, jax.random.key(first + width), jnp.int32(first))
    return pool


def _random_parts(width: PoolWidth, count: int, dtype: str, mesh: Mesh) -> Float[Array, "N 16 width"]:
    """A pool of which each device makes its part; page 0 of each region is zero."""

    def draw(key: Array) -> Array:
        pages = int(width) ** -0.5 * jax.random.normal(key, (count, RANK_PAGE, int(width)), jnp.float32)
        used = jnp.arange(count) % (count // regions_of(width)) > 0
        return jnp.where(used[:, None, None], pages, 0.0).astype(dtype)

    return jax.jit(draw, out_shardings=NamedSharding(mesh, pool_spec(width)))(jax.random.key(int(width)))


@partial(jax.jit, donate_argnums=0)
def _fill(pool: Array, key: Array, first: Array) -> Array:
    """Fills pages from `first` on with random values, starting earlier where they would not fit; page 0 stays zero."""
    count, width = min(FILL_PAGES, pool.shape[0]), pool.shape[2]
    first = jnp.minimum(first, pool.shape[0] - count)
    pages = width**-0.5 * jax.random.normal(key, (count, RANK_PAGE, width), jnp.float32)
    index = first + jnp.arange(count, dtype=jnp.int32)
    pages = jnp.where(index[:, None, None] > 0, pages, 0.0).astype(pool.dtype)
    return lax.dynamic_update_slice(pool, pages, (first, 0, 0))


def draw_slots(case: Case, num_slots: int) -> Int[Array, "B"]:
    """Each request's slot: the adapters in turn, then one request without an adapter, and so on."""
    turn = np.arange(case.batch) % (num_slots + 1)
    return jnp.asarray(np.where(turn == num_slots, BASE_SLOT, turn), jnp.int32)
