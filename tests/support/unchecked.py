"""The library as users run it: the suite's own checks of annotations see bad input first, where they are on."""

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping


@contextmanager
def annotations_unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
