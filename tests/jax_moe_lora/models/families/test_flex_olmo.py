"""FlexOlmo: norms behind the blocks, and over all heads of q and k."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.networks import EXPERTS

EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
CASE = Case("flex_olmo", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("flex_olmo"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestFlexOlmo(FamilyTests): ...
