"""Qwen3.5-MoE: the text part of a vision model, with PEFT's adapters on the whole model."""

import pytest

from support.family_tests import Case, FamilyTests, serve
from support.networks import EXPERTS

pytestmark = [pytest.mark.parity, pytest.mark.slow(60)]

LINEAR = r".*\.language_model\..*(_proj|in_proj_(qkv|z|b|a)|shared_expert_gate)"
EVERYTHING = {"r": 5, "target_modules": LINEAR, "target_parameters": ["mlp.gate.weight", *EXPERTS]}
VOCABULARY = {"r": 3, "target_modules": ["embed_tokens", "lm_head", "in_proj_qkv", "o_proj"]}
CASES = {
    "through the wrapper": Case(
        "qwen3_5_moe",
        {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
        {"everything": EVERYTHING, "vocabulary": VOCABULARY},
        targets="all",
    ),
}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp("family"))


class TestQwen35Moe(FamilyTests): ...
