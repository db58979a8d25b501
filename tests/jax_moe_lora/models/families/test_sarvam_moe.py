"""Sarvam: one tensor for q, k and v in its checkpoints, three modules for its adapters."""

import pytest

from support.family_tests import ALL_LINEAR, Case, FamilyTests, serve
from support.family_writing import WritingTests
from support.networks import ATTENTION, EXPERTS

BOTH = {"r": 5, "use_rslora": True, "target_modules": ATTENTION, "target_parameters": [*EXPERTS, "mlp.gate.weight"]}
CASE = Case("sarvam_moe", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "both": BOTH})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("sarvam_moe"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestSarvamMoe(FamilyTests, WritingTests): ...
