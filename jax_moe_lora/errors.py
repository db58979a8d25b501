"""The library's own exceptions: one clear sentence each (what came, what was expected, what to do)."""

from collections.abc import Sequence
from typing import Any

from pallas_kernels.errors import (
    InputError,
    JaxMoELoRAError,
    NotDifferentiable,
    TunedFileError,
    UnsupportedImplementation,
)

__all__ = [
    "AdapterFormatError",
    "AdapterInUseError",
    "AdapterNameError",
    "BankFullError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "InputError",
    "JaxMoELoRAError",
    "NotDifferentiable",
    "ProcessError",
    "TrainingDataError",
    "TunedFileError",
    "UnsupportedImplementation",
]


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


class TrainingDataError(InputError):
    """Lines of training data cannot be trained on.

    Attributes:
      problems: which line of which file, and what is wrong with it; one entry for each.
    """

    def __init__(self, message: str = "", *, problems: Sequence[str] = (), **details: Any):
        super().__init__(message, **details)
        self.problems = tuple(problems)


class DeviceError(JaxMoELoRAError, RuntimeError):
    """jax has no device to run on, such as `JAX_PLATFORMS=cuda` without a GPU."""


class ProcessError(JaxMoELoRAError, RuntimeError):
    """The processes of a job cannot find each other, or do not agree."""
