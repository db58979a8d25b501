"""Hypothesis draws layers and mixes, and compares them with the oracle in float64."""

import chex
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.layers import LAYOUTS, Spec, assert_close, draw

ADAPTER = st.tuples(st.sampled_from(LAYOUTS), st.sampled_from([1, 4, 8, 16, 17, 33]))


@st.composite
def specs(draw_value) -> Spec:
    experts = draw_value(st.sampled_from([1, 2, 5, 8]))
    adapters = tuple(draw_value(st.lists(ADAPTER, min_size=1, max_size=4)))
    return Spec(
        tokens=draw_value(st.sampled_from([1, 2, 7, 24])),
        hidden=draw_value(st.sampled_from([16, 40])),
        width=draw_value(st.sampled_from([8, 24])),
        experts=experts,
        top_k=draw_value(st.integers(1, experts)),
        slots=len(adapters) + draw_value(st.integers(0, 1)),
        max_rank=33,
        adapters=adapters,
        seed=draw_value(st.integers(0, 2**16)),
    )


@pytest.mark.slow
@given(spec=specs(), one_slot=st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_layer_with_any_mix_equals_the_oracle(spec, one_slot):
    problem = draw(spec)
    if one_slot:
        problem.slots[:] = 0
    y = problem.run()
    chex.assert_shape(y, (spec.tokens, spec.hidden))
    chex.assert_tree_all_finite(y)
    assert_close(y, problem.expected(np.float64), 1e-5)
    base = problem.slots == -1
    np.testing.assert_array_equal(y[base], problem.run(base=True)[base])
