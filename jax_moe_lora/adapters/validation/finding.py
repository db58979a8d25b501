"""One thing that a validation has to say."""

from dataclasses import dataclass
from typing import Literal

from jax_moe_lora.errors import JaxMoELoRAError


@dataclass(frozen=True)
class Finding:
    """What stops an adapter from being served, or changes what it does.

    Attributes:
      severity: an `error` is what loading would raise; with a `warning` alone the adapter is served as it is.
      file: its path. key: a tensor, a field of a config, or a declaration in a sidecar; empty for the whole file.
      expected, found: in few words. message: one sentence that says it all.
    """

    severity: Literal["error", "warning"]
    file: str
    key: str
    expected: str
    found: str
    message: str


def finding_of(error: JaxMoELoRAError) -> Finding:
    """The finding of an error that loading would raise."""
    return Finding("error", error.file, error.key, error.expected, error.found, str(error))
