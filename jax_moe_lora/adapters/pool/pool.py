"""Any number of adapters behind the slots of one bank, loaded by a thread when a request needs them.

A batch is admitted when every adapter that it names has a slot, or gets one: all of them at once, so that two batches
never wait for each other's. What no running batch uses and nobody pinned is evicted, longest unused first. While an
adapter is loaded, its pages go to the device in chunks; between any two of them decode steps go on with the bank of
that moment, in which its slot is still empty.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.adapters.extraction import extract
from jax_moe_lora.adapters.insertion import Insertion, Prepared, prepare
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.adapters.pool.agreement import Agreement, Alone, Beside, InOrder, Loader
from jax_moe_lora.adapters.pool.content import read_with_version, stamps
from jax_moe_lora.adapters.pool.holds import Holds
from jax_moe_lora.adapters.pool.registry import CHANGED, Entry, Read, Registry, Source, folder_changes
from jax_moe_lora.adapters.pool.shared_bank import SharedBank
from jax_moe_lora.adapters.pool.status import AdapterInfo, AdapterStatus
from jax_moe_lora.errors import AdapterFormatError, AdapterNameError, BankFullError
from pallas_kernels.ops import BASE_SLOT

Result = TypeVar("Result")


class AdapterPool:
    """Registered adapters, and the bank that holds some of them. All methods may be called from any thread."""

    def __init__(self, bank: AdapterBank, read: Read, agreement: Agreement | None = None):
        """A pool without adapters.

        Args:
          bank: where adapters will be; no adapter is in it.
          read: reads an adapter from a folder, under a name.
          agreement: with the other processes that have parts of the bank; None for one process.
        """
        self._read, self._agreement = read, agreement or Alone()
        self._registry = Registry(bank.num_slots)
        self._holds = Holds(self._registry)
        self._changed = threading.Condition(threading.RLock())  # its lock guards the registry and the bank
        self._bank = SharedBank(bank, self._changed)
        self.using, self.pausing_loads = self._bank.using, self._bank.pausing_loads
        self.num_slots = bank.num_slots
        self._loader: Loader = Beside() if self._agreement.alone else InOrder()

    def register(self, name: str, source: Source, pinned: bool = False, read: Read | None = None) -> None:
        """Makes a name known; nothing is read yet.

        Args:
          name: that requests will use.
          source: the adapter's folder, or the adapter itself.
          pinned: it keeps its slot once it has one.
          read: reads it from its folder; the pool's own if None.

        Raises:
          AdapterNameError: the name is taken or reserved.
        """
        with self._changed:
            self._registry.add(name, source, pinned, read or self._read)

    def load(self, name: str) -> None:
        """Returns when the adapter is in a slot. Raises what reading or inserting it raises."""
        with self.hold([name]) as (slot,):
            if isinstance(slot, Exception):
                raise slot

    def prefetch(self, names: Sequence[str]) -> None:
        """Begins to load adapters into slots that nobody uses, as many as there are; one process does not wait."""
        with self._changed:
            entries = self._registry.find_all(names)
            for entry in entries:
                if entry.slot is None and (slots := self._make_room(1, entries)):
                    self._begin(entry, slots[0])
        self._loader.finish()

    def forget(self, name: str) -> None:
        """Takes an adapter out of slot and registry. Raises AdapterNameError, or AdapterInUseError while it runs."""
        with self._changed:
            entry = self._registry.unused(name)
            if entry.slot is not None:
                self._evict(entry)
            del self._registry.entries[name]

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keeps an adapter in its slot once it is there, or lets it be evicted again.

        Args:
          name: the adapter's.
          pinned: False lets it be evicted.
        """
        with self._changed:
            for entry in self._registry.find_all([name]):
                entry.pinned = pinned
            self._changed.notify_all()

    def status(self, name: str) -> AdapterStatus:
        with self._changed:
            (entry,) = self._registry.find_all([name])
            return self._registry.status(entry)

    def statuses(self) -> dict[str, AdapterStatus]:
        """Of all registered adapters, by name."""
        with self._changed:
            return {name: self._registry.status(entry) for name, entry in self._registry.entries.items()}

    def loaded(self) -> list[AdapterInfo]:
        """What is in a slot, in the order of the slots."""
        with self._changed:
            return [
                AdapterInfo(entry.name, entry.slot, entry.ranks, self._bank.value.slot_nbytes(entry.slot))
                for entry in self._registry.ready()
                if entry.slot is not None
            ]

    def fetch(self, name: str) -> LoRAAdapter:
        """An adapter on the host, from its source; where its folder is gone, from the bank, in the bank's dtype.

        Raises:
          AdapterNameError: it is not registered.
          AdapterFormatError: its folder cannot be read, and it is in no slot.
        """
        with self._changed:
            entry = self._registry.find(name)
            if entry is None:
                raise AdapterNameError(f"{name!r} is the base model; name an adapter.")
            ready = entry.state == "ready"
        if isinstance(entry.source, LoRAAdapter):
            return entry.source
        source = entry.source
        if not ready or self._agreement.of_first(lambda: str(source.is_dir())) == "True":
            return entry.read(source, name)
        with self.hold([name]) as (slot,):
            if isinstance(slot, Exception):
                raise slot
            return self.pausing_loads(lambda bank: extract(bank, slot, name))

    def slots(self, names: Sequence[str | None]) -> list[int]:
        """Slots of adapters that are there now. Raises AdapterNameError: one is not registered, or has no slot."""
        with self._changed:
            return [self._registry.slot_of(name) for name in names]

    @contextmanager
    def hold(self, names: Sequence[str | None]) -> Iterator[list[int | Exception]]:
        """The slot of each name, which stays its own until the block ends, or why its adapter could not be loaded.

        Waits for slots that running requests will give back, and for adapters that have to be loaded.

        Raises:
          AdapterNameError: a name is not registered.
          BankFullError: more adapters are named than there are slots that are not pinned.
        """
        outcomes, thread = self._take(names), threading.get_ident()
        try:
            yield outcomes
        finally:
            self._give_back([slot for slot in outcomes if isinstance(slot, int)], thread)

    def acquire(self, names: Sequence[str | None]) -> list[int]:
        """As `hold`, until each slot is released. Raises, with nothing acquired, where an adapter cannot be loaded."""
        outcomes, thread = self._take(names), threading.get_ident()
        slots = [slot for slot in outcomes if isinstance(slot, int)]
        for error in (outcome for outcome in outcomes if not isinstance(outcome, int)):
            self._give_back(slots, thread)
            raise error
        with self._changed:
            self._holds.keep(slots, thread)
        return slots

    def release(self, slots: Sequence[int]) -> None:
        """Gives slots back, all that were acquired together or some of them. Raises InputError: one is not acquired."""
        with self._changed:
            self._bank.clear(self._holds.drop(slots))
            self._changed.notify_all()

    def _take(self, names: Sequence[str | None]) -> list[int | Exception]:
        self._look_for_changes(names)
        thread = threading.get_ident()
        with self._changed:
            entries = self._admit(names)
            slots = [BASE_SLOT if entry is None or entry.slot is None else entry.slot for entry in entries]
            self._holds.begin(slots, thread)
            loading = [None if entry is None else entry.loading for entry in entries]
        try:
            self._loader.finish()
            errors = [None if future is None else cast(Exception | None, future.exception()) for future in loading]
        except BaseException:  # interrupted
            self._give_back(slots, thread)
            raise
        self._give_back([slot for slot, error in zip(slots, errors, strict=True) if error is not None], thread)
        return [slot if error is None else error for slot, error in zip(slots, errors, strict=True)]

    def _give_back(self, slots: Sequence[int], thread: int) -> None:
        with self._changed:
            self._bank.clear(self._holds.end(slots, thread))
            self._changed.notify_all()

    def source(self, name: str | None) -> Source | None:
        """Where a name's adapter comes from; None for the base model. Raises AdapterNameError: it is not registered."""
        with self._changed:
            entry = self._registry.find(name)
            return None if entry is None else entry.source

    def lend(self) -> tuple[AdapterBank, dict[str, int]]:
        """The bank of this moment, for good, and the slots of its adapters by name."""
        with self._changed:
            slots = {entry.name: entry.slot for entry in self._registry.ready() if entry.slot is not None}
            return self._bank.lend(), slots

    def _admit(self, names: Sequence[str | None]) -> list[Entry | None]:
        """The adapter of each name, all of them in slots or on their way there."""
        while True:
            entries = self._registry.find_all(names)
            missing = [entry for entry in entries if entry.slot is None]
            room = self._make_room(len(missing), entries)
            if room is not None:
                break
            self._registry.check_waiting_helps(entries, waits_for_itself=self._holds.used_by(threading.get_ident()))
            self._changed.wait()
        for entry, slot in zip(missing, room, strict=True):
            self._begin(entry, slot)
        for entry in entries:
            self._registry.touch(entry)
        return [self._registry.find(name) for name in names]

    def _make_room(self, count: int, keep: Sequence[Entry]) -> list[int] | None:
        """Free slots, after evictions; None, and nothing evicted, where there are too few."""
        evictable, free = self._registry.evictable(keep), self._registry.free_slots()
        if len(free) + len(evictable) < count:
            return None
        for entry in evictable[: max(count - len(free), 0)]:
            self._evict(entry)
        return self._registry.free_slots()[:count]

    def _evict(self, entry: Entry) -> None:
        self._bank.clear([self._registry.take(entry)])

    def _begin(self, entry: Entry, slot: int) -> None:
        self._registry.give(entry, slot)
        entry.loading = self._loader.submit(self._load, entry, slot)

    def _load(self, entry: Entry, slot: int) -> None:
        """The loader's work. Where it fails the slot is empty again, and nothing else has changed."""
        try:
            with self._agreement.all_or_none(lambda: (slot, adapter.ranks, content and content.digest)):
                if isinstance(entry.source, LoRAAdapter):
                    adapter, content = entry.source, None
                else:
                    adapter, content = read_with_version(entry.read, entry.source, entry.name)
                prepared = prepare(self._bank.value, adapter)
            insertion = self._place(slot, prepared)
            for chunk in insertion.chunks():
                self._bank.write(chunk)
            with self._agreement.all_or_none(lambda: None):
                if content is not None and stamps(Path(str(entry.source))) != content.stamps:
                    raise AdapterFormatError(f"{entry.source} changed while it was read; load it when it is complete.")
            with self._changed:
                self._bank.publish(insertion)
                entry.ranks, entry.version, entry.error, entry.loading = adapter.ranks, content, None, None
        except BaseException as error:
            with self._changed:
                entry.error = error if isinstance(error, Exception) else None
                entry.loading = None
                self._evict(entry)
            raise
        finally:
            with self._changed:
                self._changed.notify_all()

    def _place(self, slot: int, prepared: Prepared) -> Insertion:
        """Pages for the adapter; what nobody uses goes until there are enough."""
        with self._changed:
            while True:
                try:
                    return self._bank.place(slot, prepared)
                except BankFullError:
                    unused = self._registry.evictable()
                    if not unused:
                        raise
                    self._evict(unused[0])

    def _look_for_changes(self, names: Sequence[str | None]) -> None:
        """Takes its slot from each ready adapter whose folder holds something else than was read: it is loaded again.

        Requests that run with it keep the old one. The bytes are read only where a file's stamps differ.
        """
        with self._changed:
            entries = [entry for entry in self._registry.find_all(names) if entry.state == "ready"]
            known = [(entry, entry.version) for entry in entries if entry.version is not None]
        if not known:
            return
        for (entry, old), change in zip(known, self._agreement.of_first(partial(folder_changes, known)), strict=True):
            with self._changed:
                if change == CHANGED and entry.version is old and entry.state == "ready":
                    self._bank.clear(self._registry.abandoned([self._registry.take(entry)]))
