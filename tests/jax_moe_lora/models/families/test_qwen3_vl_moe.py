"""Qwen3-VL-MoE: the text part of a vision model, with PEFT's adapters on the whole model."""

import pytest

from support.family_tests import Case, FamilyTests, serve
from support.networks import ATTENTION, EXPERTS

pytestmark = [pytest.mark.parity, pytest.mark.slow(60)]

EVERYTHING = {"r": 5, "target_modules": ATTENTION, "target_parameters": ["mlp.gate.weight", *EXPERTS]}
CASES = {
    "through the wrapper": Case("qwen3_vl_moe", {"num_hidden_layers": 2}, {"everything": EVERYTHING}),
}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp("family"))


class TestQwen3VlMoe(FamilyTests): ...
