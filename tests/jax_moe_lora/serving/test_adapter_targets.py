"""`adapter_targets`: pools for some modules alone, and a sentence about adapters that change others."""

import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, InputError, LoRAAdapter, Model
from jax_moe_lora.adapters.lora import uniform
from jax_moe_lora.demo.tasks import data_folder

pytestmark = pytest.mark.xdist_group("demo")
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
    for adapter, module in ((ADAPTERS / "reverse", "router"), (LoRAAdapter("mine", {(3, "head"): head}), "head")):
        with pytest.raises(AdapterFormatError, match=rf"{module}: .*loaded without room for it \(adapter_targets\)"):
            model.load_adapter(adapter, "other")
    assert "other" not in model.adapter_status


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["gate", "nose"], "adapter_targets name 'nose'; this model has q, k"),
        ([], "adapter_targets are empty"),
        ("gate", "adapter_targets is of type str; expected a list"),
    ],
)
def test_bad_targets_are_refused_before_weights_are_read(targets, message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_moe_lora.serving.model.load_params", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(InputError, match=message):
        Model.from_pretrained(FOLDER, adapter_targets=targets)
