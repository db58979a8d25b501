"""Granite: factors on embeddings, scores, residuals and logits, experts in two stacks, a tied head."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve

ROUTED = [f"block_sparse_moe.{name}" for name in ("experts.gate_up_proj", "experts.down_proj", "router.weight")]
EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": ROUTED}
CASE = Case("granitemoe", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("granitemoe"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestGraniteMoe(FamilyTests): ...
