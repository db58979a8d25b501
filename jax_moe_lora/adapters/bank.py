"""The adapter bank: fixed-capacity device memory that adapters are inserted into and removed from.

A bank is an argument of the jitted functions. Its shapes never change, so loading, unloading and any mix of adapters,
ranks and layouts run the program that is compiled already.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.addressable import copy, fetch, send
from jax_moe_lora.adapters.bank_sizes import (
    check_replacements,
    check_sites,
    matrix_bytes,
    page_bytes,
    pool_sizes,
    regions_of,
)
from jax_moe_lora.adapters.lora import TRACED, LoRAAdapter, PoolWidth, Site
from jax_moe_lora.adapters.packing import bank_nbytes
from jax_moe_lora.adapters.placement import like, placed_zeros, pool_spec, tables_spec, whole_array, whole_on
from jax_moe_lora.adapters.replacements import Replacements, create_replacements
from jax_moe_lora.adapters.updates import compile_updates, permute, placement_of, set_slot
from jax_moe_lora.adapters.validation.bank_rules import Room, check_adapter
from jax_moe_lora.arguments import is_traced, whole
from jax_moe_lora.devices import require_device
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.dtypes import NAMES, SAFETENSORS_NAMES
from pallas_kernels.pages import RANK_PAGE, LayerPages, Place
from pallas_kernels.pytrees import pytree

FREE, RESERVED = -1, -2


@pytree
@dataclass(frozen=True)
class AdapterBank:
    """Pages of adapter matrices, and the tables that find them. Make one with `create_bank`.

    Matrices are pooled by the width of their rows, over all layers and modules, so one budget serves adapters of any
    layout. Page 0 of each pool is all zeros. On a mesh (`placement.py`) pools also differ in how they are split, and
    each region of a pool begins with a page of zeros.

    Attributes:
      pools: the pages of each of `widths`: `[N, 16, width]`.
      owners: for each pool int32 `[N]`, the slot that holds each page; `FREE`, or `RESERVED` for page 0.
      tables: module -> int32 `[L, S, E, 4]`, as in `LoRAPages.table`, for each layer that has the module.
      scales: module -> float32 `[L, S, E]`.
      widths: static: the row width of each pool.
      sites: static: the model's projections.
      max_rank: static: the largest rank that fits.
      replacements: whole matrices in place of the model's embedding and head; None without room for any.
    """

    pools: tuple[Float[Array, "_N 16 _width"], ...]
    owners: tuple[Int[Array, "_N"], ...]
    tables: dict[str, Int[Array, "_L S _E 4"]]
    scales: dict[str, Float[Array, "_L S _E"]]
    widths: tuple[PoolWidth, ...] = field(metadata={"static": True})
    sites: tuple[tuple[str, Site], ...] = field(metadata={"static": True})
    max_rank: int = field(metadata={"static": True})
    replacements: Replacements | None = None

    @property
    def pages(self) -> dict[PoolWidth, Float[Array, "_N 16 _width"]]:
        """Width -> its pool."""
        return dict(zip(self.widths, self.pools, strict=True))

    @property
    def owner(self) -> dict[PoolWidth, Int[Array, "_N"]]:
        """Width -> the slot that holds each page of its pool."""
        return dict(zip(self.widths, self.owners, strict=True))

    @property
    def num_slots(self) -> int:
        return next(iter(self.scales.values())).shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.pools[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole bank, tables included."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def layer(self, layer: int) -> LayerPages:
        """One layer's adapters, for `moe_lora` and `lora_linear`; layers with the same modules give one tree form."""
        layer = whole("layer", layer, 0)  # one that adapters have nothing for is a base layer; -1 is a slip
        here = [(module, site, site.layers.index(layer)) for module, site in self.sites if layer in site.layers]
        widths = {width for _, site, _ in here for width in site.pools}
        return LayerPages(
            {str(width): pool for width, pool in self.pages.items() if width in widths},
            {module: self.tables[module][row] for module, _, row in here},
            {module: self.scales[module][row] for module, _, row in here},
            tuple(Place(module, *map(str, site.pools)) for module, site, _ in here),
            self.max_rank,
        )

    def nbytes_of(self, adapter: LoRAAdapter) -> int:
        """Bytes that an adapter will hold: what its matrices need, each in whole pages, and its whole matrices.

        Raises:
          AdapterFormatError: it does not fit the sites.
        """
        check_adapter(adapter, dict(self.sites), self.max_rank, self.dtype, self.room)
        return bank_nbytes(adapter, dict(self.sites), self.dtype)

    @property
    def room(self) -> Room:
        """The whole matrices that an adapter may bring."""
        return Room() if self.replacements is None else Room(self.replacements.shape, len(self.replacements.matrices))

    def slot_nbytes(self, slot: int) -> int:
        """Bytes of the pages, and of the whole matrices, that a slot holds.

        Args:
          slot: its number.

        Raises:
          InputError: it is out of range.
        """
        check_slot(self, slot)
        whole_matrices = 0 if self.replacements is None else self.replacements.slot_nbytes(slot)
        return whole_matrices + sum(
            int((np.asarray(ids) == slot).sum()) * page_bytes(width, self.dtype) for width, ids in self.owner.items()
        )


def create_bank(
    sites: Mapping[str, Site],
    num_slots: int,
    max_rank: int,
    memory: int | None = None,
    dtype: jax.typing.DTypeLike = "bfloat16",
    max_replacements: int = 0,
    vocabulary: tuple[int, int] | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> AdapterBank:
    """An empty bank. Compiles what loading and unloading run, so that they compile nothing.

    Args:
      sites: the projections that adapters may target; for a mesh as `mesh.rules.split_sites` gives them.
      num_slots: S, adapters that can be loaded at once.
      max_rank: the largest rank accepted.
      memory: byte budget of pages and whole matrices, on each device; None takes what S per-expert adapters of
        `max_rank` on every site need, and no budget makes the bank larger than that. It is shared out as a per-expert
        adapter on every site would use it.
      dtype: of the pages: float32, bfloat16 or float16.
      max_replacements: C, whole matrices in place of the model's embedding or head that loaded adapters may bring, all
        of them together. They come off the budget first.
      vocabulary: V and D, the shape of these matrices.
      mesh: the devices that the bank is split over; None for the default device.

    Raises:
      InputError: a size that is not a positive whole number, invalid sites, a dtype that adapters are not served in, or
        a budget below one page per pool and the whole matrices.
      DeviceError: jax has no device.
    """
    require_device()
    num_slots, max_rank = whole("num_slots", num_slots, 1), whole("max_rank", max_rank, 1)
    if memory is not None:
        memory = whole("memory", memory, 0, 2**63 - 1)
    dtype = np.dtype(jnp.dtype(dtype))
    if dtype not in SAFETENSORS_NAMES:
        raise InputError(f"dtype is {dtype.name}; expected one of {', '.join(NAMES)}.")
    check_sites(sites)
    count, shape = check_replacements(max_replacements, vocabulary, memory, dtype)
    if memory is not None:
        memory -= count * matrix_bytes(shape, dtype)
    sizes = pool_sizes(sites, num_slots * -(-max_rank // RANK_PAGE), memory, dtype)
    bank = _empty_bank(sites, num_slots, max_rank, dtype, sizes, mesh)
    bank = replace(bank, replacements=create_replacements(count, shape, num_slots, dtype, mesh))
    compile_updates(bank.pools, bank.tables, bank.scales, *empty_slot(bank))
    return bank


def _empty_bank(
    sites: Mapping[str, Site],
    num_slots: int,
    max_rank: int,
    dtype: np.dtype,
    sizes: Mapping[PoolWidth, int],
    mesh: jax.sharding.Mesh | None,
) -> AdapterBank:
    def pool(width: PoolWidth, pages: int) -> Array:
        return placed_zeros((regions_of(width) * (1 + pages), RANK_PAGE, int(width)), dtype, mesh, pool_spec(width))

    def owners(width: PoolWidth, pages: int) -> Array:
        ids = np.full(regions_of(width) * (1 + pages), FREE, np.int32)
        ids[:: 1 + pages] = RESERVED
        return whole_array(ids, whole_on(mesh))

    def of_experts(site: Site, columns: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Array:
        return placed_zeros((len(site.layers), num_slots, site.num_experts, *columns), dtype, mesh, tables_spec(site))

    return AdapterBank(
        pools=tuple(pool(width, pages) for width, pages in sizes.items()),
        owners=tuple(owners(width, pages) for width, pages in sizes.items()),
        tables={module: of_experts(site, (4,), jnp.int32) for module, site in sites.items()},
        scales={module: of_experts(site, (), jnp.float32) for module, site in sites.items()},
        widths=tuple(sizes),
        sites=tuple(sites.items()),
        max_rank=max_rank,
    )


def remove(bank: AdapterBank, slot: int, donate: bool = False) -> AdapterBank:
    """A bank whose `slot` is empty: its rows are base rows at once, its pages are free.

    Args:
      bank: it is not changed.
      slot: the slot to empty.
      donate: reuse the memory of `bank`, which must not be used again.

    Raises:
      InputError: the slot is out of range, or the bank is the view of a layer.
    """
    check_whole(bank)
    check_slot(bank, slot)
    tables, scales = empty_slot(bank)
    owners = like(bank.owners, [np.where(ids == slot, np.int32(FREE), ids) for ids in map(np.asarray, bank.owners)])
    new_tables, new_scales = set_slot(*writable((bank.tables, bank.scales), donate), int(slot), tables, scales)
    replacements = None if bank.replacements is None else bank.replacements.clear(int(slot))
    return replace(bank, owners=owners, tables=new_tables, scales=new_scales, replacements=replacements)


def compact(bank: AdapterBank) -> AdapterBank:
    """The same adapters with their pages moved together, so that all free pages of a region lie side by side."""
    check_whole(bank)
    pools, owners, new_id = [], [], {}
    for width, pool, ids in zip(bank.widths, bank.pools, map(np.asarray, bank.owners), strict=True):
        regions = regions_of(width)
        region = np.repeat(np.arange(regions), len(ids) // regions)
        order = np.lexsort((ids == FREE, region)).astype(np.int32)
        pools.append(permute(pool, order))
        owners.append(ids[order])
        new_id[width] = np.argsort(order).astype(np.int32)
    tables = {}
    for module, site in bank.sites:
        table = np.array(fetch(bank.tables[module]))
        for column, width in enumerate(site.pools):
            table[..., column] = new_id[width][table[..., column]]
        tables[module] = send(table, placement_of(bank.tables[module]))
    # Nothing is shared with the old bank, so that the new one can be donated.
    scales = writable(bank.scales, donate=False)
    return replace(bank, pools=tuple(pools), owners=like(bank.owners, owners), tables=tables, scales=scales)


def writable(arrays, donate: bool):
    """Arrays to write into. The copy compiles nothing, and one program serves both cases.

    Args:
      arrays: a tree of device arrays.
      donate: whether the arrays themselves may be written into.

    Returns:
      The arrays, or copies of them.
    """
    return arrays if donate else copy(arrays)


def empty_slot(bank: AdapterBank) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A slot's entries in the tables and the scales where it holds no adapter.

    Args:
      bank: the bank.

    Returns:
      Module -> int32 `[L, E, 4]`, and module -> float32 `[L, E]`, all zero.
    """
    tables = {m: np.zeros((t.shape[0], *t.shape[2:]), np.int32) for m, t in bank.tables.items()}
    return tables, {m: np.zeros((s.shape[0], s.shape[2]), np.float32) for m, s in bank.scales.items()}


def check_slot(bank: AdapterBank, slot: int) -> None:
    """Raises an `InputError` for what is not a slot of the bank."""
    if isinstance(slot, bool) or not isinstance(slot, int | np.integer) or not 0 <= slot < bank.num_slots:
        raise InputError(f"Slot is {slot!r}; the bank has slots 0 to {bank.num_slots - 1}.")


def check_whole(bank: AdapterBank) -> None:
    """Refuses what is not a bank, such as one layer's pages, which know no owners; and a bank inside of jit."""
    if not isinstance(bank, AdapterBank):
        raise InputError(f"bank is of type {type(bank).__name__}; expected an AdapterBank.")
    if any(map(is_traced, jax.tree.leaves(bank))):
        raise InputError(f"bank {TRACED}")
