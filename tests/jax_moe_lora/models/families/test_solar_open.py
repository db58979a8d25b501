"""Solar Open: heads wider than the model, YaRN, biases of q, k and v alone."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.networks import EXPERTS

EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
CASE = Case("solar_open", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("solar_open"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestSolarOpen(FamilyTests): ...
