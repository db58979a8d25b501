"""DeepSeek-V3: latent attention, and experts chosen by sigmoid among the best groups."""

import pytest

from support.family_tests import AttentionTests, Case, FamilyTests, serve
from support.networks import EXPERTS

pytestmark = [pytest.mark.parity, pytest.mark.slow(60), pytest.mark.optimised]

# All linear layers, and the experts and routers, which are parameters.
EVERYTHING = {"r": 5, "target_modules": "all-linear", "target_parameters": ["mlp.gate.weight", *EXPERTS]}
ONE_SIDED = {"r": 12, "use_rslora": True, "target_modules": ["kv_b_proj", "q_a_proj"]}
ADAPTERS = {"everything": EVERYTHING, "one-sided": ONE_SIDED}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
}
CASES = {
    "yarn": Case("deepseek_v3", {"rope_parameters": YARN, "attention_bias": True}, ADAPTERS),
}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp(request.param))


class TestDeepseekV3(FamilyTests, AttentionTests): ...
