"""The kernels that make a plan, in jax's GPU interpreter, against the plan through XLA."""

import pytest

from pallas_kernels.plan import hopper_few_pairs, hopper_many_pairs
from support.plans import assert_kernel_makes_the_plan_of_xla

pytestmark = pytest.mark.usefixtures("interpreter")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "tokens", "top_k", "experts", "slots"),
    [
        (hopper_few_pairs, 5, 2, 8, 3),
        (hopper_few_pairs, 100, 3, 70, 0),
        pytest.param(hopper_few_pairs, 40, 8, 128, 8, marks=pytest.mark.newest),
        (hopper_few_pairs, 3, 2, 256, 64),
        (hopper_many_pairs, 5, 2, 8, 3),
        pytest.param(hopper_many_pairs, 300, 2, 70, 0, marks=pytest.mark.newest),
        (hopper_many_pairs, 700, 3, 128, 8),
        (hopper_many_pairs, 200, 8, 256, 64),
    ],
)
def test_the_plan_kernels_equal_the_plan_through_xla(kernel, tokens, top_k, experts, slots, monkeypatch):
    assert_kernel_makes_the_plan_of_xla(kernel, (tokens, top_k, experts, slots), monkeypatch)
