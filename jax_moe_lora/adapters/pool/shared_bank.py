"""One bank that decode steps read while a loader writes into it."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from jax_moe_lora.adapters.addressable import copy
from jax_moe_lora.adapters.bank import AdapterBank, remove
from jax_moe_lora.adapters.insertion import Chunk, Insertion, Prepared, place, write

Result = TypeVar("Result")


class SharedBank:
    """The bank of this moment. A write gives it new arrays in the old ones' memory, so nobody keeps them but by `lend`.

    `using`, `pausing_loads`, `lend` and `write` take the lock themselves; callers of the others have it.
    """

    def __init__(self, bank: AdapterBank, changed: threading.Condition):
        self.value = bank
        self._changed = changed
        self._lent = False  # somebody else holds these arrays, so their memory is not ours to write into
        self._pauses = 0  # calls under way with arrays that no load may write into

    def using(self, call: Callable[[AdapterBank], Result]) -> Result:
        """`call(bank)` with the bank of this moment; for starting a step: nothing else goes on before it returns."""
        with self._changed:
            return call(self.value)

    def pausing_loads(self, call: Callable[[AdapterBank], Result]) -> Result:
        """As `using`, for what takes long, such as compiling a step: loads wait for it, other steps do not."""
        with self._changed:
            self._pauses += 1
            bank = self.value
        try:
            return call(bank)
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

    def lend(self) -> AdapterBank:
        """The bank of this moment, for good: the next change is made in a copy."""
        with self._changed:
            self._lent = True
            return self.value

    def write(self, chunk: Chunk) -> None:
        """Writes some pages, when no call pauses loads."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pauses)
            if self._lent:
                self.value, self._lent = copy(self.value), False
            self.value = write(self.value, chunk)

    def place(self, slot: int, prepared: Prepared) -> Insertion:
        """Pages for an adapter. Raises BankFullError: too few are free."""
        self.value, insertion = place(self.value, slot, prepared)
        return insertion

    def publish(self, insertion: Insertion) -> None:
        """Makes an adapter whose pages are written visible in its slot."""
        self.value = insertion.publish(self.value)

    def clear(self, slots: Sequence[int]) -> None:
        """Empties slots."""
        for slot in slots:
            self.value = remove(self.value, slot)
