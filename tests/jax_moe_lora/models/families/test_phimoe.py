"""Phi-3.5-MoE: SparseMixer, layer norms, biases everywhere, LongRoPE, windows."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.networks import EXPERTS

EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": [*EXPERTS, "mlp.router.weight"]}
CASE = Case("phimoe", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("phimoe"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestPhiMoe(FamilyTests): ...
