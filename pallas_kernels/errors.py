"""The exceptions that both packages raise: one clear sentence each (what came, what was expected, what to do)."""

from pathlib import Path


class JaxMoELoRAError(Exception):
    """Base class of every error that this library raises on bad input.

    Attributes:
      file: the file that the error is about, where there is one.
      key: a tensor of that file, or a field of a config.
      found: what stands there, in few words.
      expected: what may stand there, in few words.
    """

    def __init__(
        self, message: str = "", *, file: Path | str = "", key: str = "", found: object = "", expected: str = ""
    ):
        # A hostile file may put megabytes into what a message quotes.
        super().__init__(message if len(message) <= 4000 else f"{message[:3000]} … {message[-900:]}")
        self.file, self.key, self.found, self.expected = str(file), key, str(found)[:200], expected


class InputError(JaxMoELoRAError, ValueError):
    """An argument of a call has a wrong value, shape or dtype."""


class UnsupportedImplementation(JaxMoELoRAError, ValueError):
    """The requested backend cannot run this call; the message says why, and what can."""


class NotDifferentiable(JaxMoELoRAError, TypeError):
    """The op has no gradient of its own; the message names the function that has."""


class TunedFileError(JaxMoELoRAError, ValueError):
    """A tuned file cannot be used; the message names the file, the entry and what was expected."""
