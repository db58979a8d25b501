"""Which adapter is in which slot, and which slots running requests hold. Host side, thread-safe."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jax_moe_lora.errors import AdapterInUseError, AdapterNameError, BankFullError
from pallas_kernels import BASE_SLOT

BASE_NAMES = (None, "__base__")


class SlotRegistry:
    """Names of adapters, their slots, and reference counts of the slots."""

    def __init__(self, num_slots: int):
        self._lock = threading.Lock()
        self._slot_of: dict[str, int] = {}
        self._loading: dict[str, int] = {}  # their pages are not in the bank yet, so no request may find them
        self._references = [0] * num_slots
        self._running = 0

    @property
    def slots(self) -> dict[str, int]:
        """Name -> slot of the loaded adapters, in the order of their slots."""
        with self._lock:
            return dict(sorted(self._slot_of.items(), key=lambda item: item[1]))

    @property
    def idle(self) -> bool:
        """Whether no request is running, so that the bank's memory may be reused in place."""
        with self._lock:
            return self._running == 0

    def reserve(self, name: str) -> int:
        """A free slot for a new name, which requests find after `publish`. Call `forget` if it does not get there."""
        if not isinstance(name, str) or not name or name in BASE_NAMES:
            raise AdapterNameError(f"Adapter name {name!r} is reserved, empty or no text; choose another.")
        with self._lock:
            if name in self._slot_of or name in self._loading:
                state = "loaded already; unload it first" if name in self._slot_of else "loading; wait for it"
                raise AdapterNameError(f"An adapter named {name!r} is {state} or choose another name.")
            free = set(range(len(self._references))) - {*self._slot_of.values(), *self._loading.values()}
            if not free:
                raise BankFullError(
                    f"All {len(self._references)} adapter slots are taken, so {name!r} has none; "
                    "unload an adapter or raise max_adapters."
                )
            self._loading[name] = min(free)
            return self._loading[name]

    def publish(self, name: str) -> None:
        """Lets requests find a reserved name. Call when its pages are in the bank."""
        with self._lock:
            self._slot_of[name] = self._loading.pop(name)

    def check_removable(self, name: str) -> int:
        """The slot of a loaded adapter that no running request holds."""
        if name is None or name == "__base__":
            raise AdapterNameError(f"{name!r} is the base model, which is never unloaded; name a loaded adapter.")
        with self._lock:
            slot = self._find(name)
            if self._references[slot]:
                raise AdapterInUseError(
                    f"Adapter {name!r} is used by {self._references[slot]} running requests; wait for them."
                )
            return slot

    def forget(self, name: str) -> None:
        with self._lock:
            self._slot_of.pop(name, None)
            self._loading.pop(name, None)

    def find(self, names: Sequence[str | None]) -> list[int]:
        """Slots of a batch's adapters; `None` and `"__base__"` are the base model."""
        with self._lock:
            return [self._find(name) for name in names]

    @contextmanager
    def hold(self, names: Sequence[str | None]) -> Iterator[list[int]]:
        """The slots of a batch's adapters, which stay theirs until the block ends."""
        with self._lock:
            slots = [self._find(name) for name in names]
            self._count(slots, 1)
        try:
            yield slots
        finally:
            with self._lock:
                self._count(slots, -1)

    def _count(self, slots: Sequence[int], change: int) -> None:
        self._running += change
        for slot in slots:
            if slot != BASE_SLOT:
                self._references[slot] += change

    def _find(self, name: str | None) -> int:
        if name is not None and not isinstance(name, str):
            raise AdapterNameError(f"Adapter name {name!r} is no text; give a loaded adapter's name, or None.")
        if name in BASE_NAMES:
            return BASE_SLOT
        if name in self._loading:
            raise AdapterNameError(f"Adapter {name!r} is still loading; use it when load_adapter has returned.")
        if name not in self._slot_of:
            loaded = ", ".join(sorted(self._slot_of)) or "none"
            raise AdapterNameError(f"No adapter named {name!r} is loaded (loaded: {loaded}); load it first.")
        return self._slot_of[name]
