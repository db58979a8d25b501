"""What several processes that serve one model decide together, and a single one by itself."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Agreement(Protocol):
    """How processes come to the same decisions; each calls the same methods in the same order.

    Attributes:
      alone: there is one process, whose loads go on beside its steps. With several, loads run in the order of the
        calls, on the caller's thread, so that all processes run the same programs in the same order.
    """

    alone: bool

    def all_or_none(self, value: Callable[[], Any]) -> AbstractContextManager[None]:
        """A block that fails in all processes where it fails in one, and after which `value()` is the same in all."""

    def of_first(self, message: Callable[[], str]) -> str:
        """What the first process says."""


class Alone:
    """One process: nothing to agree on."""

    alone = True

    def all_or_none(self, value: Callable[[], Any]) -> AbstractContextManager[None]:
        return nullcontext()

    def of_first(self, message: Callable[[], str]) -> str:
        return message()


class Loader(Protocol):
    """Runs loads one after the other."""

    def submit(self, load: Callable[..., None], /, *arguments: Any) -> "Future[None]":
        """Takes a load on. Does not wait."""

    def finish(self) -> None:
        """Runs what was taken on, where nobody else does."""


class Beside:
    """Loads on a thread of their own, while steps go on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")

    def submit(self, load: Callable[..., None], /, *arguments: Any) -> "Future[None]":
        return self._thread.submit(load, *arguments)

    def finish(self) -> None:
        pass


class InOrder:
    """Loads on the thread of the caller, in the order in which they were taken on."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Future[None], Callable[..., None], tuple[Any, ...]]] = []

    def submit(self, load: Callable[..., None], /, *arguments: Any) -> "Future[None]":
        self._waiting.append((Future(), load, arguments))
        return self._waiting[-1][0]

    def finish(self) -> None:
        while self._waiting:
            future, load, arguments = self._waiting.pop(0)
            try:
                load(*arguments)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(None)
