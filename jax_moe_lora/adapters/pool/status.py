"""What users are told of adapters."""

from dataclasses import dataclass

from jax_moe_lora.adapters.pool.registry import State


@dataclass(frozen=True)
class AdapterStatus:
    """What can be asked of a registered adapter.

    Attributes:
      state: `registered` (a name and a folder), `loading`, `ready` (in a slot) or `failed` (see `error`; the next
        request tries again).
      references: requests that run with it.
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
      slot: its row in the bank's tables. ranks: module -> the ranks that occur in it.
      nbytes: device memory of its pages.
    """

    name: str
    slot: int
    ranks: dict[str, tuple[int, ...]]
    nbytes: int
