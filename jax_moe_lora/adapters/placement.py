"""Where the pages of a bank are on a mesh of devices, and what one of these devices sees of them.

The pages of an expert's matrices lie on the devices that have the expert, and of a projection whose rows are split each
device has its columns. So a pool that is split by experts consists of regions, one after the other; the tables count
pages over the whole pool, as everywhere else. A device that has one region counts from its beginning (`local_bank`).
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from jax_moe_lora.adapters.addressable import send
from jax_moe_lora.adapters.lora import PoolWidth, Site, SplitWidth

if TYPE_CHECKING:
    from jax_moe_lora.adapters.bank import AdapterBank


def pool_spec(width: PoolWidth) -> P:
    """How a pool `[N, 16, width]` is split.

    Args:
      width: the pool's.
    """
    if not isinstance(width, SplitWidth):
        return P(None, None, None)
    return P(width.region_axes or None, None, width.axes or None)


def tables_spec(site: Site) -> P:
    """How a module's tables and scales, `[L, S, E, ...]`, are split.

    Args:
      site: the module's.
    """
    return P(None, None, (site.split[0].region_axes if site.split else ()) or None)


def placed_zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, mesh: Mesh | None, spec: P) -> jax.Array:
    """Zeros on a mesh, or on the default device.

    Args:
      shape: the array's.
      dtype: the array's.
      mesh: the devices; None for the default one.
      spec: how they split it.
    """
    return jnp.zeros(shape, dtype, device=None if mesh is None else NamedSharding(mesh, spec))


def whole_on(mesh: Mesh | None) -> NamedSharding | None:
    """Where small arrays go of which each process has all; None for the default device.

    Args:
      mesh: the devices; None for the default one.
    """
    placement = None if mesh is None else NamedSharding(mesh, P())
    return None if placement is None or placement.is_fully_addressable else placement


def whole_array(values: np.ndarray, placement: Sharding | None) -> jax.Array:
    """A small array of the host, which each process has.

    Args:
      values: the array.
      placement: as `whole_on` gives it.
    """
    return send(values, placement) if isinstance(placement, NamedSharding) else jnp.asarray(values)


def like(arrays: Iterable[jax.Array], values: Iterable[np.ndarray]) -> tuple[jax.Array, ...]:
    """Arrays with other values, on the devices where they are.

    Args:
      arrays: from `whole_array`.
      values: as many of the host.
    """
    return tuple(whole_array(new, old.sharding) for old, new in zip(arrays, values, strict=True))


def bank_specs(bank: "AdapterBank") -> Any:
    """How each array of a bank is split: a tree of its form, for `jax.shard_map`.

    Args:
      bank: the bank.
    """
    sites = dict(bank.sites)

    def spec(path: tuple[Any, ...], _: Any) -> P:
        field, *keys = path
        if field.name == "pools":
            return pool_spec(bank.widths[keys[0].idx])
        return tables_spec(sites[keys[0].key]) if field.name in ("tables", "scales") else P()

    return jax.tree.map_with_path(spec, bank)


def local_bank(bank: "AdapterBank") -> "AdapterBank":
    """Inside of `jax.shard_map`: the bank of one device, whose tables count the pages that it has.

    Args:
      bank: the arrays of one device.
    """
    tables = dict(bank.tables)
    for module, site in bank.sites:
        if site.regions > 1:
            first = [
                lax.axis_index(width.region_axes) * bank.pages[width].shape[0]
                for width in site.pools
                if isinstance(width, SplitWidth)
            ]
            table = tables[module]
            pages = jnp.where(table[..., 2:3] > 0, table[..., :2] - jnp.stack(first)[None, None, None], 0)
            tables[module] = jnp.concatenate((pages, table[..., 2:]), axis=-1)
    return replace(bank, tables=tables)
