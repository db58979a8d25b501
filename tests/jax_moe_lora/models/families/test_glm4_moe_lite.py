"""GLM-4.7-Flash: values that are wider than queries and keys, layers that are dense or routed one by one."""

import pytest

from support.family_tests import Case, FamilyTests, serve

pytestmark = [pytest.mark.parity, pytest.mark.slow(60)]

CASES = {"wide-values": Case("glm4_moe_lite", {"rms_norm_eps": 1e-5, "rope_interleave": False})}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp(request.param))


class TestGlm4MoeLite(FamilyTests): ...
