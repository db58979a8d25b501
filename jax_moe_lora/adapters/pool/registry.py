"""Who is in which slot, and who uses it: bookkeeping on the host, without a device and without a lock of its own.

A registered adapter has a slot, or is a name and a source alone. A slot that requests use is never given to another
adapter; of the others the one that was used longest ago goes first, unless its adapter is pinned. An adapter whose
folder has changed gets a new slot while requests that began before go on with the old one, which nobody finds any more.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.adapters.pool.content import Version, newer_version
from jax_moe_lora.adapters.pool.status import AdapterStatus, State
from jax_moe_lora.errors import AdapterInUseError, AdapterNameError, BankFullError
from pallas_kernels.ops import BASE_SLOT

BASE_NAMES = (None, "__base__")
CHANGED, SAME = "10"
Source = Path | LoRAAdapter
Read = Callable[[Path, str], LoRAAdapter]


@dataclass
class Entry:
    """A registered adapter.

    Attributes:
      name: that requests use.
      source: its folder, or the adapter itself.
      pinned: it keeps its slot until it is unpinned or forgotten.
      read: reads it from its folder.
      slot: where it is, or is being loaded to; None without one.
      loading: done when its last load is.
      version: of the folder that was read.
      error: of its last load, if it failed.
      ranks: module -> the ranks that occur in it, once it has been read.
    """

    name: str
    source: Source
    pinned: bool
    read: Read
    slot: int | None = None
    loading: "Future[None] | None" = None
    version: Version | None = None
    error: Exception | None = None
    ranks: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def state(self) -> State:
        if self.slot is not None:
            return "ready" if self.loading is None else "loading"
        return "failed" if self.error else "registered"


@dataclass
class Slot:
    """One slot of the bank.

    Attributes:
      entry: the adapter that it is for; None if there is none, or it has another slot by now.
      references: running requests that use it.
      used: when it was used last, by the registry's count.
    """

    entry: Entry | None = None
    references: int = 0
    used: int = 0


class Registry:
    """Names, slots and references. Every method leaves it consistent; the caller sees to it that one runs at a time."""

    def __init__(self, num_slots: int):
        self.entries: dict[str, Entry] = {}
        self.slots = [Slot() for _ in range(num_slots)]
        self._clock = 0

    def add(self, name: str, source: Source, pinned: bool, read: Read) -> Entry:
        """Makes a name known.

        Args:
          name: that requests will use.
          source: the adapter's folder, or the adapter itself.
          pinned: it keeps its slot once it has one.
          read: reads it from its folder.

        Raises:
          AdapterNameError: the name is reserved, empty, not a string, or taken.
        """
        if not isinstance(name, str) or not name or name in BASE_NAMES:
            raise AdapterNameError(f"Adapter name {name!r} is reserved, empty or not a string; choose another.")
        if name in self.entries:
            state = self.entries[name].state
            raise AdapterNameError(
                f"There already is an adapter named {name!r} ({state}); unload it or choose another name."
            )
        self.entries[name] = Entry(name, source, pinned, read)
        return self.entries[name]

    def find(self, name: str | None) -> Entry | None:
        """The adapter of a name, or None for the base model. Raises AdapterNameError: it is not registered."""
        if name is not None and not isinstance(name, str):
            raise AdapterNameError(f"Adapter name {name!r} is not a string; give an adapter's name, or None.")
        if name in BASE_NAMES:
            return None
        if name not in self.entries:
            known = sorted(self.entries)
            some = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
            raise AdapterNameError(f"No adapter named {name!r} is loaded or registered (there are: {some or 'none'}).")
        return self.entries[name]

    def find_all(self, names: Sequence[str | None]) -> list[Entry]:
        """The adapters of the names, each once. Raises AdapterNameError: one is not registered."""
        entries = [self.find(name) for name in names]
        return list({entry.name: entry for entry in entries if entry is not None}.values())

    def unused(self, name: str | None) -> Entry:
        """The adapter of a name. Raises AdapterNameError, or AdapterInUseError while it loads or requests use it."""
        entry = self.find(name)
        if entry is None:
            raise AdapterNameError(f"{name!r} is the base model, which is never unloaded; name an adapter.")
        if entry.state == "loading":
            raise AdapterInUseError(f"Adapter {name!r} is loading; wait for it.")
        if uses := self.references(entry):
            raise AdapterInUseError(f"Adapter {name!r} is used by {uses} running requests; wait for them.")
        return entry

    def slot_of(self, name: str | None) -> int:
        """The slot of a name. Raises AdapterNameError: it is not registered, or has no slot."""
        entry = self.find(name)
        if entry is not None and entry.state != "ready":
            raise AdapterNameError(f"Adapter {name!r} is {entry.state}, not in a slot; load it first.")
        return BASE_SLOT if entry is None or entry.slot is None else entry.slot

    def free_slots(self) -> list[int]:
        return [number for number, slot in enumerate(self.slots) if slot.entry is None and not slot.references]

    def evictable(self, keep: Collection[Entry] = ()) -> list[Entry]:
        """Ready adapters that nobody uses and nobody pinned, the one that was used longest ago first."""
        kept = {entry.name for entry in keep}
        evictable = [
            slot
            for slot in self.slots
            if slot.entry is not None and not slot.references and not slot.entry.pinned and slot.entry.name not in kept
        ]
        ready = [slot.entry for slot in sorted(evictable, key=lambda slot: slot.used) if slot.entry is not None]
        return [entry for entry in ready if entry.state == "ready"]

    def pinned(self, but: Collection[Entry]) -> int:
        """Pinned adapters that are in a slot or on their way there, but for these."""
        kept = {entry.name for entry in but}
        entries = [slot.entry for slot in self.slots if slot.entry is not None]
        return sum(entry.pinned and entry.name not in kept for entry in entries)

    def check_waiting_helps(self, entries: Collection[Entry], waits_for_itself: bool) -> None:
        """Refuses to wait where that would not help, since nobody else is going to make room.

        Args:
          entries: the adapters that need slots at once.
          waits_for_itself: the thread that would wait has running requests itself, whose slots stay taken.

        Raises:
          BankFullError: waiting would not help.
        """
        pinned = self.pinned(but=entries)
        if len(entries) + pinned <= len(self.slots) and not waits_for_itself:
            return
        others = f", {pinned} held by adapters that were loaded or pinned" if pinned else ""
        others += ", the rest used by running requests of this thread itself" if waits_for_itself else ""
        raise BankFullError(
            f"The bank has too few adapter slots: {len(self.slots)} in all, {len(entries)} needed at once{others}; "
            "unload or unpin some, ask for fewer, or raise max_adapters."
        )

    def abandoned(self, slots: Collection[int]) -> list[int]:
        """The given slots that have neither an adapter nor a request any more: they can be cleared."""
        numbers = {slot for slot in slots if slot != BASE_SLOT}
        return [slot for slot in numbers if self.slots[slot].entry is None and not self.slots[slot].references]

    def give(self, entry: Entry, slot: int) -> None:
        """Gives a free slot to an adapter that has none.

        Args:
          entry: the adapter.
          slot: the slot.
        """
        self.slots[slot].entry, entry.slot = entry, slot
        self.touch(entry)

    def take(self, entry: Entry) -> int:
        """An adapter's slot from it. It is free once no request uses it."""
        slot, entry.slot = entry.slot, None
        assert slot is not None
        self.slots[slot].entry = None
        return slot

    def touch(self, entry: Entry) -> None:
        assert entry.slot is not None
        self._clock += 1
        self.slots[entry.slot].used = self._clock

    def count(self, slots: Sequence[int], change: int) -> None:
        """Counts requests that begin or end.

        Args:
          slots: the slot of each; a base row's is ignored.
          change: 1 or -1.
        """
        for slot in slots:
            if slot != BASE_SLOT:
                self.slots[slot].references += change

    def references(self, entry: Entry) -> int:
        return 0 if entry.slot is None else self.slots[entry.slot].references

    def status(self, entry: Entry) -> AdapterStatus:
        error = None if entry.error is None else str(entry.error)
        return AdapterStatus(entry.name, entry.state, entry.pinned, entry.slot, self.references(entry), error)

    def ready(self) -> Iterator[Entry]:
        """Adapters in the order of their slots."""
        for slot in self.slots:
            if slot.entry is not None and slot.entry.state == "ready":
                yield slot.entry


def folder_changes(known: Sequence[tuple[Entry, Version]]) -> str:
    """A character for each adapter, `CHANGED` where its folder holds something else than was read, else `SAME`.

    Args:
      known: adapters, and what was read of them.
    """
    changes = ""
    for entry, old in known:
        # A folder that is gone is no reason to stop serving.
        new = newer_version(entry.source, old) if isinstance(entry.source, Path) else None
        changes += CHANGED if new is not None and new.digest != old.digest else SAME
        if new is not None and changes[-1] == SAME and entry.version is old:
            entry.version = new
    return changes
