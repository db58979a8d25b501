"""K-EXAONE: layers with windows and positions, and layers with neither."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.networks import EXPERTS

EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
CASE = Case("exaone_moe", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("exaone_moe"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestExaoneMoe(FamilyTests): ...
