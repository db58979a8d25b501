"""Phi-3.5-MoE: SparseMixer, layer norms, biases everywhere, LongRoPE, windows."""

import pytest

from support.family_tests import Case, FamilyTests, serve
from support.networks import ATTENTION, EXPERTS

# Not all-linear: the class of the router is a linear layer to PEFT, and gives it a tuple.
ATTENTION_ADAPTER = {"r": 3, "target_modules": ATTENTION}
EXPERT_ADAPTER = {"r": 5, "use_rslora": True, "target_parameters": [*EXPERTS, "mlp.router.weight"]}
CASE = Case("phimoe", {"num_hidden_layers": 2}, {"attention": ATTENTION_ADAPTER, "experts": EXPERT_ADAPTER})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return serve(CASE, tmp_path_factory.mktemp("phimoe"))


@pytest.mark.parity
@pytest.mark.slow(60)
class TestPhiMoe(FamilyTests): ...
