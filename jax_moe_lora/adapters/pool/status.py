"""What users are told of adapters."""

from dataclasses import dataclass
from typing import Literal

State = Literal["registered", "loading", "ready", "failed"]


@dataclass(frozen=True)
class AdapterStatus:
    """What can be asked of a registered adapter.

    Attributes:
      name: that requests use.
      state: `registered` (a name and a folder), `loading`, `ready` (in a slot) or `failed` (see `error`; the next
        request tries again).
      pinned: whether it keeps its slot.
      slot: its row in the bank's tables; None without one.
      references: running requests that use it.
      error: why its last load failed; None if it did not.
    """

    name: str
    state: State
    pinned: bool
    slot: int | None
    references: int
    error: str | None


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter in a slot: what it takes.

    Attributes:
      name: that requests use.
      slot: its row in the bank's tables.
      ranks: module -> the ranks that occur in it.
      nbytes: device memory of its pages, and of its whole matrices.
    """

    name: str
    slot: int
    ranks: dict[str, tuple[int, ...]]
    nbytes: int
