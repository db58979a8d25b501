"""GLM-4.5: half of each head is turned, a dense first layer, a bias for the choice of experts, a shared expert."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.networks import ATTENTION, EXPERTS

pytestmark = [pytest.mark.parity, pytest.mark.slow(60)]

BOTH = {"r": 5, "use_rslora": True, "target_modules": ATTENTION, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
CASES = {"glm4_moe": Case("glm4_moe", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "both": BOTH})}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp(request.param))


class TestGlm4Moe(FamilyTests): ...
