"""Layers of every pair of sizes, with adapters and mixes that hypothesis draws, against the oracle in float64."""

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.layers import LAYOUTS, Spec, assert_close, draw
from support.pairs import covering_pairs

pytestmark = pytest.mark.optimised

ADAPTER = st.tuples(st.sampled_from(LAYOUTS), st.sampled_from([1, 4, 8, 16, 17, 33]))


# The sizes of a program are given and what it reads is drawn: one compilation for several mixes.
@pytest.mark.slow
@covering_pairs(tokens=[1, 24], experts=[(1, 1), (2, 1), (5, 5), (8, 3)], widths=[(16, 24), (40, 8)])
@given(adapters=st.lists(ADAPTER, min_size=1, max_size=4), seed=st.integers(0, 2**16), one_slot=st.booleans())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_layer_with_any_mix_equals_the_oracle(tokens, experts, widths, adapters, seed, one_slot):
    sizes = dict(zip(("hidden", "width", "experts", "top_k"), (*widths, *experts), strict=True))
    problem = draw(Spec(tokens, slots=4, max_rank=33, adapters=tuple(adapters), seed=seed, **sizes))
    if one_slot:
        problem.slots[:] = 0
    y = problem.run()
    chex.assert_shape(y, (tokens, problem.spec.hidden))
    chex.assert_tree_all_finite(y)
    assert_close(y, problem.expected(np.float64), 1e-5)
    base = problem.slots == -1
    np.testing.assert_array_equal(y[base], problem.run(base=True)[base])
