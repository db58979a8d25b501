"""One thing that a validation has to say."""

from dataclasses import dataclass
from typing import Literal

from jax_moe_lora.errors import JaxMoELoRAError


@dataclass(frozen=True)
class Finding:
    """What stops an adapter from being served, or changes what it does.

    Attributes:
      severity: an `error` is what loading would raise; with a `warning` alone the adapter is served as it is.
      file: the file's path, or what a config object is called.
      key: a tensor, a field of a config, or a declaration in a sidecar; empty for the whole file.
      expected: what should stand there, in few words.
      found: what stands there, in few words.
      message: a sentence that says it all, and a second one where the same holds for other keys.
      keys: all keys that the finding holds for, the first of them `key`; empty where only one thing is meant.
    """

    severity: Literal["error", "warning"]
    file: str
    key: str
    expected: str
    found: str
    message: str
    keys: tuple[str, ...] = ()


def finding_of(error: JaxMoELoRAError) -> Finding:
    """The finding of an error that loading would raise.

    Args:
      error: the error.
    """
    return Finding("error", error.file, error.key, error.expected, error.found, str(error))
