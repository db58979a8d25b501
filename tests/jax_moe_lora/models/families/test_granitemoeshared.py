"""Granite with a shared expert of one projection in and one out."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve

EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": ["block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj", "block_sparse_moe.router.weight"]}
CASE = Case("granitemoeshared", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("granitemoeshared"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestGraniteMoeShared(FamilyTests): ...
