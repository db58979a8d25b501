"""Qwen3-Next: gated delta-net and gated attention by turns."""

import pytest

from support.family_tests import ALL_LINEAR, AttentionTests, Case, FamilyTests, serve
from support.networks import EXPERTS

pytestmark = [pytest.mark.parity, pytest.mark.slow(60), pytest.mark.optimised]

EVERYTHING = {"r": 5, "target_modules": "all-linear", "target_parameters": ["mlp.gate.weight", *EXPERTS]}
CASES = {
    "delta-net and attention": Case(
        "qwen3_next",
        {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [1]},
        {"linear": ALL_LINEAR, "everything": EVERYTHING},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp("family"))


class TestQwen3Next(FamilyTests, AttentionTests): ...
