"""Cases that hold every pair of values of any two parameters, in place of every combination."""

from collections.abc import Iterable
from typing import Any

import pytest
from allpairspy import AllPairs


def covering_pairs(**parameters: Iterable[Any]) -> pytest.MarkDecorator:
    """`@covering_pairs(shape=SHAPES, dtype=["float32", "bfloat16"], ...)`, in place of one `parametrize` each."""
    cases = [pytest.param(*case, id="-".join(map(str, case))) for case in AllPairs([[*v] for v in parameters.values()])]
    return pytest.mark.parametrize(tuple(parameters), cases)
