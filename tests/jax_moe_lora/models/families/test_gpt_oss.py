"""gpt-oss: sinks beside a window, biases, and experts stored as `[E, in, out]` with gate and up interleaved."""

import pytest

from support.family_gradients import GradientTests
from support.family_tests import ALL_LINEAR, AttentionTests, Case, FamilyTests, serve
from support.family_writing import WritingTests
from support.networks import ATTENTION, EXPERTS

pytestmark = [pytest.mark.parity, pytest.mark.slow(60), pytest.mark.optimised]

BOTH = {
    "r": 5,
    "use_rslora": True,
    "target_modules": ATTENTION,
    "target_parameters": [*EXPERTS, "mlp.router.weight"],
}
CASES = {"gpt_oss": Case("gpt_oss", {"num_hidden_layers": 2}, {"linear": ALL_LINEAR, "both": BOTH})}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp(request.param))


class TestGptOss(FamilyTests, AttentionTests, GradientTests, WritingTests): ...
