"""Hunyuan-A13B: norms of q and k behind their rotation, a base that alpha stands for, a shared expert."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.networks import EXPERTS

EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": [*EXPERTS]}
CASE = Case("hunyuan_v1_moe", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("hunyuan_v1_moe"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestHunyuanMoe(FamilyTests): ...
