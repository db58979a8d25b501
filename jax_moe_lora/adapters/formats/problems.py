"""What becomes of a problem that a reader meets: loading stops at the first, validation goes on and keeps them all."""

from types import TracebackType

from jax_moe_lora.errors import JaxMoELoRAError


class Problems:
    """A block `with problems:` is one step that may be refused. Where errors are kept, the next step runs all the same.

    Loading and validation run the same readers, and differ only in this.

    Attributes:
      keep: whether errors are kept; if not, they are raised.
      found: the errors that were kept.
    """

    def __init__(self, keep: bool = False):
        self.keep, self.found = keep, list[JaxMoELoRAError]()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not self.keep or not isinstance(error, JaxMoELoRAError):
            return False
        self.found.append(error)
        return True
