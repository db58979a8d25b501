"""Trinity: gated attention, norms before and behind the blocks, layers without positions, scaled embeddings."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.networks import EXPERTS

EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": [*EXPERTS]}
CASE = Case("afmoe", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("afmoe"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestAfmoe(FamilyTests): ...
