"""The library's own exceptions: one clear sentence each (what came, what was expected, what to do)."""

from pathlib import Path


class JaxMoELoRAError(Exception):
    """Base class of every error that this library raises on bad input.

    Attributes:
      file, key: what it is about, where that is a file: a tensor of it or a field of a config.
      found, expected: what stands there and what may, in few words.
    """

    def __init__(
        self, message: str = "", *, file: Path | str = "", key: str = "", found: object = "", expected: str = ""
    ):
        # A hostile file may put megabytes into what a message quotes.
        super().__init__(message if len(message) <= 4000 else f"{message[:3000]} … {message[-900:]}")
        self.file, self.key, self.found, self.expected = str(file), key, str(found)[:200], expected


class ConfigError(JaxMoELoRAError, ValueError):
    """A model's `config.json` is missing, malformed, or asks for something that is not supported."""


class CheckpointError(JaxMoELoRAError, ValueError):
    """A checkpoint's files are missing, corrupt, or do not hold the tensors that its config promises."""


class AdapterFormatError(JaxMoELoRAError, ValueError):
    """An adapter's files are missing, corrupt, not understood, or do not fit the model."""


class AdapterNameError(JaxMoELoRAError, KeyError):
    """An adapter name is unknown, taken, or reserved."""

    def __str__(self) -> str:  # KeyError would print the sentence in quotes
        return str(self.args[0]) if self.args else ""


class AdapterInUseError(JaxMoELoRAError, RuntimeError):
    """A slot cannot be changed because a running request holds it."""


class BankFullError(JaxMoELoRAError, RuntimeError):
    """The adapter bank has no free slot, or not enough free pages, for an adapter."""


class DeviceError(JaxMoELoRAError, RuntimeError):
    """jax has no device to run on, such as `JAX_PLATFORMS=cuda` without a GPU."""


class InputError(JaxMoELoRAError, ValueError):
    """An argument of a call has a wrong value, shape or dtype."""
