"""Which implementation runs a call, and why not the others."""

from dataclasses import dataclass
from typing import Literal, cast

import jax

Implementation = Literal["hopper", "portable", "xla", "reference"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("hopper", "portable", "xla", "reference")


class UnsupportedImplementation(ValueError):
    """The requested implementation does not run this call; the message says why and what does."""


@dataclass(frozen=True)
class Choice:
    """The implementation that was picked, and for each other one why it was not."""

    picked: Implementation
    why_not: dict[str, str]


def choose(implementation: str | None = None) -> Choice:
    """Picks the implementation of the grouped ops; `None` takes the best that is available.

    Raises:
      UnsupportedImplementation: for a name that is unknown, or known and not available here.
    """
    platform = jax.default_backend()
    why_not = {
        "hopper": "its kernels are not written yet",
        "portable": "its kernels are not written yet",
        "reference": "it is written for reading, not for speed: ask for it by name",
    }
    if implementation is None:
        return Choice("xla", why_not)
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedImplementation(
            f"implementation={implementation!r} is unknown; use one of {IMPLEMENTATIONS} or None."
        )
    if implementation in ("hopper", "portable"):
        raise UnsupportedImplementation(
            f"implementation={implementation!r} cannot run on {platform}: {why_not[implementation]}; use 'xla' or None."
        )
    return Choice(
        cast(Implementation, implementation), {name: why for name, why in why_not.items() if name != implementation}
    )
