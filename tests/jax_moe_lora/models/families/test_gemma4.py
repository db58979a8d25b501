"""Gemma 4: a dense MLP beside the experts, widths by layer, values that are keys, norms everywhere."""

import pytest

from support.family_gradients import GradientTests
from support.family_tests import ALL_LINEAR, AttentionTests, Case, FamilyTests, serve
from support.family_writing import WritingTests
from support.networks import ATTENTION

pytestmark = [pytest.mark.parity, pytest.mark.slow(60), pytest.mark.optimised]

BOTH = {
    "r": 5,
    "use_rslora": True,
    "target_modules": [*ATTENTION, "router.proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
CASES = {"gemma4": Case("gemma4_text", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "both": BOTH})}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp(request.param))


class TestGemma4(FamilyTests, AttentionTests, GradientTests, WritingTests): ...
