"""dots.llm1: a dense first layer, sigmoid router with a bias, shared experts, windows in the last layers."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.networks import EXPERTS

EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
CASE = Case("dots1", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("dots1"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestDots1(FamilyTests): ...
