"""Every activation by name: the layer against the reference."""

from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
import pytest

from jax_moe_lora.config import MoEConfig
from pallas_kernels.ops import Activation
from support.layers import Spec, assert_close, draw


@dataclass(frozen=True)
class Activated(Spec):
    """A layer with one activation."""

    activation: Activation = "silu"

    @property
    def config(self) -> MoEConfig:
        return replace(super().config, activation=self.activation)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_each_activation_equals_the_reference(activation):
    sizes = {"tokens": 9, "hidden": 16, "width": 8, "experts": 4, "top_k": 2}
    problem = draw(Activated(**sizes, adapters=(), slots=1, max_rank=16, activation=activation))
    assert_close(problem.run(base=True), problem.expected(np.float64), 1e-5)
