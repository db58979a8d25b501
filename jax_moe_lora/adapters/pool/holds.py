"""Slots in use: how many requests use each, and from which threads. Without a lock of its own, as the registry."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from jax_moe_lora.adapters.pool.registry import Registry
from jax_moe_lora.errors import InputError
from pallas_kernels.ops import BASE_SLOT


class Holds:
    """Counts uses of slots. Every method leaves it consistent; the caller sees to it that one runs at a time."""

    def __init__(self, registry: Registry):
        self._registry = registry
        self._uses: Counter[int] = Counter()  # thread -> the uses that it began
        self._acquired: defaultdict[int, list[int]] = defaultdict(list)  # slot -> threads of uses that `release` ends

    def begin(self, slots: Sequence[int], thread: int) -> None:
        """Counts one use of each slot, begun by a thread."""
        self._registry.count(slots, 1)
        self._uses[thread] += sum(slot != BASE_SLOT for slot in slots)

    def end(self, slots: Sequence[int], thread: int) -> list[int]:
        """Ends one use of each slot; returns the slots that have neither an adapter nor a use any more."""
        self._registry.count(slots, -1)
        self._uses[thread] -= sum(slot != BASE_SLOT for slot in slots)
        return self._registry.abandoned(slots)

    def keep(self, slots: Sequence[int], thread: int) -> None:
        """Lets `drop` end uses that have begun."""
        for slot in slots:
            if slot != BASE_SLOT:
                self._acquired[slot].append(thread)

    def drop(self, slots: Sequence[int]) -> list[int]:
        """Ends one kept use of each slot, from any thread; returns the slots that have no adapter and no use now.

        Raises:
          InputError: a slot has no kept use, or fewer than are named. Nothing has changed then.
        """
        for slot, uses in Counter(slots).items():
            acquired = len(self._acquired.get(slot, ()))
            if slot != BASE_SLOT and acquired < uses:
                raise InputError(
                    f"Slot {slot} is acquired {acquired} times and released {uses} times; release what `acquire` gave."
                )
        unused = []
        for slot in slots:
            if slot != BASE_SLOT:
                unused += self.end([slot], self._acquired[slot].pop())
        return unused

    def used_by(self, thread: int) -> bool:
        """Whether a thread has begun uses that have not ended."""
        return self._uses[thread] > 0
