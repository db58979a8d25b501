"""`adapter_targets`: pools for some modules alone, and a sentence about adapters that change others."""

from pathlib import Path

import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, InputError, LoRAAdapter, Model
from jax_moe_lora.adapters.lora import uniform
from jax_moe_lora.cli.generate import load_model
from jax_moe_lora.demo.tasks import data_folder

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.optimised]
FOLDER, ADAPTERS = data_folder() / "model", data_folder() / "adapters"


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.from_pretrained(FOLDER, dtype="float32", max_adapters=2, adapter_targets=["gate", "up", "down"])


def test_pools_are_made_for_these_modules_alone(model: Model) -> None:
    bank = model.functional(1, 8).bank
    assert {module for module, _ in bank.sites} == {"gate", "up", "down"}
    assert bank.layer(0).modules == ("gate", "up", "down")
    assert not bank.layer(model.config.num_layers).modules  # neither embedding nor head
    assert set(bank.widths) == {model.config.hidden_size, model.config.moe.expert_width}
    assert model.load_adapter(ADAPTERS / "upper", "upper").ranks.keys() == {"gate", "up", "down"}


def test_an_adapter_on_another_module_is_refused_with_the_name_of_the_option(model: Model) -> None:
    head = uniform(np.ones((1, 2, 64), np.float32), np.ones((1, 99, 2), np.float32), 1.0, 1)
    for adapter, message in (
        (ADAPTERS / "reverse", r"router: .*loaded without room for it \(adapter_targets\)"),
        (LoRAAdapter("mine", {(3, "head"): head}), "head: .*load it with adapter_targets='all'"),
    ):
        with pytest.raises(AdapterFormatError, match=message):
            model.load_adapter(adapter, "other")
    assert "other" not in model.adapter_status


def test_embedding_and_head_have_pools_on_request_alone() -> None:
    modules = {}
    for targets in (None, "all"):
        bank = Model.from_pretrained(FOLDER, max_adapters=1, max_rank=16, adapter_targets=targets).functional(1, 8).bank
        modules[targets] = {module for module, _ in bank.sites}
    assert modules["all"] - modules[None] == {"embedding", "head"}


def test_the_command_makes_room_for_the_head_where_an_adapter_changes_it(model: Model, tmp_path: Path) -> None:
    head = uniform(np.ones((1, 2, 64), np.float32), np.ones((1, model.config.vocab_size, 2), np.float32), 1.0, 1)
    model.save_adapter(LoRAAdapter("head", {(model.config.num_layers, "head"): head}), tmp_path / "head")
    served = load_model(str(FOLDER), [f"a={tmp_path / 'head'}", f"b={ADAPTERS / 'upper'}"], [], "float32", 32, "1GiB")
    assert served.adapters["a"].ranks == {"head": (2,)}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["gate", "nose"], "adapter_targets name 'nose'; this model has q, k"),
        ([], "adapter_targets are empty"),
        ("gate", "adapter_targets is 'gate'; expected 'all', or a list of modules"),
    ],
)
def test_bad_targets_are_refused_before_weights_are_read(targets, message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_moe_lora.serving.model.load_params", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=message):
        Model.from_pretrained(FOLDER, adapter_targets=targets)
