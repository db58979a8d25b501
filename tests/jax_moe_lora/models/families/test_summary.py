"""The list of families is told by their own blocks."""

import json
import sys

import pytest

from jax_moe_lora.cli.main import main
from jax_moe_lora.models.families.examples import EXAMPLES
from jax_moe_lora.models.families.registry import FAMILIES
from jax_moe_lora.models.families.summary import summaries


def test_every_family_has_an_example() -> None:
    assert {*EXAMPLES} <= {*FAMILIES}
    assert [one.model_type for one in summaries()] == [*FAMILIES], "models/families/examples.py has a line for each"


def test_what_distinguishes_a_family_is_said() -> None:
    found = {one.model_type: one for one in summaries()}
    afmoe, granite, ernie = (found[name] for name in ("afmoe", "granitemoeshared", "ernie4_5_moe"))
    assert [kind.split(", ")[0] for kind in afmoe.attention] == ["grouped-query: window", "grouped-query: no positions"]
    assert "norms before and behind the blocks" in afmoe.others
    assert "self_attn.{q,k,v,o,gate}_proj" in afmoe.targets
    assert {"shared_mlp.input_linear", "block_sparse_moe.experts.{gate_up,down}_proj"} <= {*granite.targets}
    assert ernie.router == "softmax, a bias for the choice, renormalised"
    assert "neighbours turned together" in ernie.attention[0]
    assert found["phimoe"].router == "SparseMixer"


def test_the_command_lists_every_family(monkeypatch, capsys) -> None:
    for arguments in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["jax-moe-lora", "families", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert not caught.value.code
        written = capsys.readouterr().out
        assert all(name in written for name in FAMILIES)
    assert [one["model_type"] for one in json.loads(written)] == [*FAMILIES]
