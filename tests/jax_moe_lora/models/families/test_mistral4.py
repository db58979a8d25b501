"""Mistral Small 4: queries that grow with their position, experts by softmax among groups."""

import pytest

from support.family_tests import Case, FamilyTests, serve

pytestmark = [pytest.mark.parity, pytest.mark.slow(60)]

# Requests go beyond several of the spans by which queries grow.
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
CASES = {"groups": Case("mistral4", {"rope_parameters": ROPE, "n_group": 2, "topk_group": 1})}


@pytest.fixture(scope="module", params=CASES)
def served(request, tmp_path_factory):
    return serve(CASES[request.param], tmp_path_factory.mktemp(request.param))


class TestMistral4(FamilyTests): ...
