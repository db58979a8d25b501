"""Puts an adapter into a bank: all at once (`insert`), or in chunks between which other work goes on.

    prepare   checks the adapter and cuts it into pages: host alone, needs no bank but its sizes
    place     finds pages and marks them as the slot's; nothing can fail after it but the device
    chunks    its rows, each chunk sent to the device, then `write` puts it into its pages
    publish   writes the slot's tables: from here on its rows use the adapter

Until `publish` the slot is empty, whatever has been written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.addressable import send
from jax_moe_lora.adapters.bank import (
    FREE,
    AdapterBank,
    check_slot,
    check_whole,
    compact,
    empty_slot,
    page_bytes,
    writable,
)
from jax_moe_lora.adapters.bank_sizes import regions_of
from jax_moe_lora.adapters.lora import LoRAAdapter, PoolWidth
from jax_moe_lora.adapters.packing import (
    PackedAdapter,
    allocate_in_regions,
    chunks,
    missing_pages,
    pack,
    page_ids,
    pages_of,
)
from jax_moe_lora.adapters.placement import like
from jax_moe_lora.adapters.replacements import matrix_chunks
from jax_moe_lora.adapters.updates import chunk_placement, chunk_rows, placement_of, set_slot, write_rows
from jax_moe_lora.adapters.validation.bank_rules import check_adapter
from jax_moe_lora.errors import BankFullError, InputError
from pallas_kernels.ops import RANK_PAGE


def insert(bank: AdapterBank, slot: int, adapter: LoRAAdapter, donate: bool = False) -> AdapterBank:
    """A bank that holds `adapter` in `slot`. Nothing is compiled: `create_bank` has done it.

    Everything is checked before anything is written: when this raises, `bank` is as it was.

    Args:
      bank: it is not changed.
      slot: an empty slot.
      adapter: what to put into it.
      donate: reuse the memory of `bank`, which must not be used again. Never donate a bank that a running step uses.

    Raises:
      InputError: the slot is out of range or taken.
      AdapterFormatError: the adapter does not fit the sites, has a rank above `max_rank`, or holds weights that are not
        finite in the bank's dtype.
      BankFullError: not enough free pages.
    """
    placed, insertion = place(bank, slot, prepare(bank, adapter))
    # Pools that were compacted for this insertion are new, so that they may be written into.
    moved = any(new is not old for new, old in zip(placed.pools, bank.pools, strict=True))
    pools, tables, scales = writable((placed.pools, placed.tables, placed.scales), donate or moved)
    placed = replace(placed, pools=pools, tables=tables, scales=scales)
    if insertion.replaced:  # no compaction moves these
        placed = replace(placed, replacements=writable(placed.replacements, donate))
    for chunk in insertion.chunks():
        placed = write(placed, chunk)
    return insertion.publish(placed, donate=True)


@dataclass(frozen=True)
class Prepared:
    """An adapter that was checked.

    Attributes:
      adapter: the adapter.
      packed: where its matrices go relative to each other.
    """

    adapter: LoRAAdapter
    packed: PackedAdapter


def prepare(bank: AdapterBank, adapter: LoRAAdapter) -> Prepared:
    """Checks an adapter and cuts it into pages.

    Args:
      bank: where it is to go.
      adapter: the adapter.

    Raises:
      AdapterFormatError: the adapter does not fit the bank, or has weights that are not finite in its dtype.
      InputError: it is not a LoRAAdapter, or the bank is one layer's pages.
    """
    if not isinstance(adapter, LoRAAdapter):
        raise InputError(f"adapter is of type {type(adapter).__name__}; expected a LoRAAdapter.")
    check_whole(bank)
    sites = dict(bank.sites)
    check_adapter(adapter, sites, bank.max_rank, bank.dtype, bank.room)
    return Prepared(adapter, pack(adapter, sites))


@dataclass(frozen=True)
class Chunk:
    """Rows of one pool, or of one whole matrix, on the device.

    Attributes:
      width: of the pool.
      rows: int32 `[n]`, rows of the pool's pages; what is past the end is dropped.
      values: `[n, width]`, or `[width, n]` where they are `columns`, in the order in which a file has them.
      columns: whether the values are columns.
      matrix: the whole matrix that the rows are of; None for rows of a pool.
    """

    width: PoolWidth
    rows: Int[Array, "n"]
    values: Float[Array, "_n _width"]
    columns: bool
    matrix: int | None = None

    def arrived(self) -> "Chunk":
        """The chunk once its copy to the device is complete, so that no step waits for it behind a write."""
        jax.block_until_ready((self.rows, self.values))
        return self


def write(bank: AdapterBank, chunk: Chunk) -> AdapterBank:
    """A bank with the chunk's rows written. The pool of its width, or the whole matrix, is donated.

    Args:
      bank: that pool or matrix of it must not be used again.
      chunk: what to write.
    """
    if chunk.matrix is not None and bank.replacements is not None:
        return replace(bank, replacements=bank.replacements.write(chunk.matrix, chunk.rows, chunk.values))
    pools = list(bank.pools)
    index = bank.widths.index(chunk.width)
    pools[index] = write_rows(pools[index], chunk.rows, chunk.values, chunk.columns)
    return replace(bank, pools=tuple(pools))


@dataclass(frozen=True)
class Insertion:
    """An adapter on its way into a slot.

    Attributes:
      slot: where it goes.
      prepared: the adapter.
      first: width -> first page of each of the adapter's runs.
      rows: width -> rows that one chunk holds.
      pool_rows: width -> rows of the pool.
      placements: width -> where the pool is.
      dtype: the bank's.
      replaced: embedding or head -> the whole matrix that it gets.
      matrix_placement: where the whole matrices are on a mesh; None for the default device.
    """

    slot: int
    prepared: Prepared
    first: Mapping[PoolWidth, np.ndarray]
    rows: Mapping[PoolWidth, int]
    pool_rows: Mapping[PoolWidth, int]
    placements: Mapping[PoolWidth, jax.sharding.Sharding]
    dtype: np.dtype
    replaced: Mapping[str, int] = field(default_factory=dict)
    matrix_placement: jax.sharding.Sharding | None = None

    def chunks(self) -> Iterator[Chunk]:
        """Everything that goes into the bank. While one chunk is written the next one is on its way to the device."""
        before: Chunk | None = None
        for width, rows, values, columns, matrix in self._all_host_chunks():
            of_pool = chunk_placement(self.placements.get(width), columns)
            placement = of_pool if matrix is None else (self.matrix_placement,) * 2
            sent_rows, sent_values = map(send, (rows, values), placement or (None, None))
            if before is not None:
                yield before.arrived()
            before = Chunk(width, sent_rows, sent_values, columns, matrix)
        if before is not None:
            yield before.arrived()

    def _all_host_chunks(self) -> Iterator[tuple[PoolWidth, np.ndarray, np.ndarray, bool, int | None]]:
        for width in self.prepared.packed.widths:
            for rows, values, columns in self._host_chunks(width):
                yield width, rows, values, columns, None
        matrices = self.prepared.adapter.replacements
        for place, module in {place: module for module, place in self.replaced.items()}.items():
            for rows, values in matrix_chunks(matrices[module], self.dtype):
                yield values.shape[1], rows, values, False, place

    def _host_chunks(self, width: PoolWidth) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
        """Rows in chunks of one static size, so that adapters of any size and layout share two programs."""
        packed, size, past_the_end = self.prepared.packed.widths[width], self.rows[width], self.pool_rows[width]
        ids = page_ids(self.first[width], np.concatenate(packed.runs))
        # One entry more, for the place -1.
        row_of = np.append(ids[:, None] * RANK_PAGE + np.arange(RANK_PAGE), past_the_end).astype(np.int32)
        empty = np.ones(len(row_of) - 1, bool)
        for columns in (False, True):
            for values, places in chunks(packed.stacks, columns, size, self.dtype):
                empty[places[places >= 0]] = False
                yield row_of[places], values, columns
        rest = row_of[np.flatnonzero(empty)]  # rows of pages beyond their matrix's rank
        for begin in range(0, len(rest), size):
            rows = np.full(size, past_the_end, np.int32)
            rows[: len(rest) - begin] = rest[begin : begin + size]
            yield rows, np.zeros((size, int(width)), self.dtype), False

    def publish(self, bank: AdapterBank, donate: bool = False) -> AdapterBank:
        """A bank whose slot has the adapter.

        Args:
          bank: its pages have been written.
          donate: write the tables into the memory of the old ones.
        """
        tables, scales = empty_slot(bank)
        sites, weights = dict(bank.sites), self.prepared.adapter.weights
        for (layer, module), (runs_a, runs_b, ranks) in self.prepared.packed.entries.items():
            site, row = sites[module], sites[module].layers.index(layer)
            live = ranks > 0
            for column, (width, runs) in enumerate(zip(site.pools, (runs_a, runs_b), strict=True)):
                tables[module][row, live, column] = self.first[width][runs[live]]
            tables[module][row, :, 2] = pages_of(ranks)
            tables[module][row, :, 3] = ranks
            scales[module][row] = np.where(live, weights[layer, module].scale, 0)
        new_tables, new_scales = set_slot(*writable((bank.tables, bank.scales), donate), int(self.slot), tables, scales)
        bank = replace(bank, tables=new_tables, scales=new_scales)
        if bank.replacements is None or not self.replaced:
            return bank
        return replace(bank, replacements=bank.replacements.publish(int(self.slot), self.replaced))


def place(bank: AdapterBank, slot: int, prepared: Prepared) -> tuple[AdapterBank, Insertion]:
    """A bank in which the adapter's pages and whole matrices are the slot's.

    It is compacted first if free pages are too scattered.

    Args:
      bank: it is not changed.
      slot: an empty slot.
      prepared: the adapter.

    Raises:
      InputError: the slot is out of range or taken.
      BankFullError: not enough free pages, or whole matrices.
    """
    check_slot(bank, slot)
    owner = {width: np.array(ids) for width, ids in bank.owner.items()}
    if bank.slot_nbytes(slot):
        raise InputError(f"Slot {slot} is taken; remove its adapter first.")
    first: dict[PoolWidth, np.ndarray] = {}
    for width, stack in prepared.packed.widths.items():
        free, regions = owner[width] == FREE, regions_of(width)
        if missing_pages(free, stack, regions):
            raise BankFullError(_full(bank, prepared, owner))
        first_pages = allocate_in_regions(free, stack, regions)
        if first_pages is None:
            return place(compact(bank), slot, prepared)
        first[width] = first_pages
        owner[width][page_ids(first_pages, np.concatenate(stack.runs))] = slot
    pools, replacements = bank.pages, bank.replacements
    replaced: dict[str, int] = {}
    if replacements is not None and (matrices := prepared.adapter.replacements):
        replacements, replaced = replacements.place(prepared.adapter.name, slot, matrices)
    insertion = Insertion(
        slot,
        prepared,
        first,
        rows={width: chunk_rows(pools[width]) for width in first},
        pool_rows={width: pools[width].shape[0] * RANK_PAGE for width in first},
        placements={width: pools[width].sharding for width in first},
        dtype=bank.dtype,
        replaced=replaced,
        matrix_placement=None if replacements is None else placement_of(replacements.matrices[0]),
    )
    return replace(bank, owners=like(bank.owners, owner.values()), replacements=replacements), insertion


def _full(bank: AdapterBank, prepared: Prepared, owner: Mapping[PoolWidth, np.ndarray]) -> str:
    wanted = free = 0
    on_devices = ", on the devices of its experts too few" if max(map(regions_of, bank.widths)) > 1 else ""
    for width, stack in prepared.packed.widths.items():
        wanted += sum(int(runs.sum()) for runs in stack.runs) * page_bytes(width, bank.dtype)
        free += int((np.asarray(bank.owner[width]) == FREE).sum()) * page_bytes(width, bank.dtype)
    return (
        f"Adapter {prepared.adapter.name!r} needs {wanted} bytes of pages and the bank has {free} free of the kinds it "
        f"needs{on_devices}; unload an adapter or give a larger adapter_memory."
    )
