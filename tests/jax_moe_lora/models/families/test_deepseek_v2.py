"""DeepSeek-V2: queries of the hidden row itself, experts by softmax among the best groups."""

import pytest

from support.family_tests import Case, FamilyTests, serve

pytestmark = [pytest.mark.parity, pytest.mark.slow(60)]

CASES = {"plain-queries": Case("deepseek_v2", {"q_lora_rank": None, "routed_scaling_factor": 2.0})}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp(request.param))


class TestDeepseekV2(FamilyTests): ...
