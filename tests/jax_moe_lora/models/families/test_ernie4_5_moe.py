"""Ernie 4.5: softmax router with a bias for the choice, neighbours turned together, biases, a tied head."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.networks import EXPERTS

EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
CASE = Case("ernie4_5_moe", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("ernie4_5_moe"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestErnie45Moe(FamilyTests): ...
