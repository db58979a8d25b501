"""The first four families: grouped-query attention, softmax routers."""

import pytest

from support.family_tests import ALL_LINEAR, AttentionTests, Case, FamilyTests, serve
from support.networks import ATTENTION, EXPERTS

pytestmark = [pytest.mark.parity, pytest.mark.slow(60), pytest.mark.optimised]

BOTH = {"r": 5, "use_rslora": True, "target_modules": ATTENTION, "target_parameters": EXPERTS}
CASES = {
    "mixtral": Case("mixtral", {"num_hidden_layers": 2, "sliding_window": 11}, {"linear": ALL_LINEAR, "both": BOTH}),
}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp(request.param))


class TestFirstFamilies(FamilyTests, AttentionTests): ...
