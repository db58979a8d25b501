"""MiniMax-M2: norms over all heads of q and k, heads that are turned in part, a bias for the choice of experts."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.networks import ATTENTION, EXPERTS

pytestmark = [pytest.mark.parity, pytest.mark.slow(60)]

BOTH = {"r": 5, "use_rslora": True, "target_modules": ATTENTION, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
CASES = {"minimax_m2": Case("minimax_m2", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "both": BOTH})}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp(request.param))


class TestMiniMaxM2(FamilyTests): ...
