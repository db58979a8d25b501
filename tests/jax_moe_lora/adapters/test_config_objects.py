"""A config is validated before any folder exists: PEFT's `LoraConfig`, its fields, or target modules."""

import dataclasses
import enum
from pathlib import Path
from typing import Any

import pytest

from jax_moe_lora import ConfigError, InputError, validate_config
from jax_moe_lora.models.config_file import read_model_config
from support.checkpoints import write as write_checkpoint


class Kind(str, enum.Enum):  # noqa: UP042  (as PEFT has it)
    LORA = "LORA"


@dataclasses.dataclass
class LoraConfig:
    """Stands for PEFT's: the same names of the same types."""

    peft_type: Kind = Kind.LORA
    r: int = 8
    lora_alpha: int = 16
    target_modules: Any = None
    target_parameters: Any = None
    modules_to_save: Any = None
    use_dora: bool = False
    rank_pattern: dict = dataclasses.field(default_factory=dict)
    runtime_config: dict = dataclasses.field(default_factory=lambda: {"ephemeral_gpu_offload": False})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SERVED: dict[str, Any] = {
    "a list": ["q_proj", "v_proj", "gate_proj"],
    "a set": {"q_proj", "o_proj"},
    "full names": ["model.layers.0.mlp.experts.2.up_proj", "model.layers.1.mlp.up_proj"],
    "fields": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "an object": LoraConfig(target_modules={"q_proj"}, target_parameters=EXPERTS),
    "the router's parameter": LoraConfig(target_parameters=["mlp.gate.weight"]),
    "a regex": LoraConfig(target_modules=r".*\.layers\.\d+\..*_proj"),
    "the head and the embeddings": ["q_proj", "lm_head", "embed_tokens"],
    "the embeddings, by a regex": LoraConfig(target_modules=".*(q_proj|embed_tokens)"),
}


@pytest.mark.parametrize("case", SERVED)
def test_a_config_that_can_be_served_has_no_findings(model, case):
    assert validate_config(SERVED[case], model) == []


REFUSED: dict[str, tuple[Any, str, str]] = {
    "DoRA": (LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora", "DoRA is not supported"),
    "modules_to_save": (
        LoraConfig(target_modules=["q_proj"], modules_to_save=["score"]),
        "modules_to_save",
        "of whole modules embed_tokens and lm_head alone are served",
    ),
    "nothing of the model": (["fc1", "fc2"], "target_modules", "match no projection of the model, which has"),
    "no such parameter": (
        LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_proj"]),
        "target_parameters.mlp.experts.gate_proj",
        "no parameter of the model",
    ),
    "a rank": (LoraConfig(target_modules=["q_proj"], r=128), "r", "rank 128; the bank takes at most 64"),
    "a rank of a pattern": (LoraConfig(target_modules=["q_proj"], rank_pattern={"q_proj": 65}), "r", "rank 65"),
    "an invalid field": ({"r": "8", "lora_alpha": 16, "target_modules": ["q_proj"]}, "r", "whole number"),
    "an invalid target": ({"r": 8, "lora_alpha": 16, "target_modules": 3}, "target_modules", "a list of names"),
    "a layer that is not there": (
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "layers_to_transform": [2]},
        "target_modules",
        "match no projection",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_not_be_served_is_an_error_by_its_field(model, case):
    config, key, message = REFUSED[case]
    (finding,) = validate_config(config, read_model_config(model))
    assert (finding.severity, finding.key) == ("error", key)
    assert message in finding.message


def test_names_and_patterns_that_match_nothing_are_warnings(model):
    config = LoraConfig(target_modules=["q_proj", "fc1"], rank_pattern={"k_proj": 4})
    assert [(f.severity, f.key, f.file) for f in validate_config(config, model)] == [
        ("warning", "target_modules.fc1", "LoraConfig"),
        ("warning", "rank_pattern.k_proj", "LoraConfig"),
    ]


def test_whole_embedding_and_head_are_warned_of_with_their_size(model):
    config = LoraConfig(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head", "model.embed_tokens"])
    found = validate_config(config, model)
    assert [(f.severity, f.key) for f in found] == [
        ("warning", "modules_to_save.lm_head"),
        ("warning", "modules_to_save.model.embed_tokens"),
    ]
    assert all("32 * 16 values" in f.message and "max_replacements" in f.message for f in found)


def test_ranks_are_held_against_the_banks(model):
    assert validate_config(LoraConfig(target_modules=["q_proj"], r=128), model, max_rank=128) == []


@pytest.mark.parametrize("config", [None, "q_proj", 3, LoraConfig, [1]], ids=str)
def test_what_is_no_config_is_refused(model, config):
    if config == [1]:
        assert [f.key for f in validate_config(config, model)] == ["target_modules"]
    else:
        with pytest.raises(InputError, match="LoraConfig"):
            validate_config(config, model)
    with pytest.raises(InputError, match="ModelConfig"):
        validate_config(["q_proj"], 3)
    with pytest.raises(ConfigError):
        validate_config(["q_proj"], Path(__file__).parent)


@pytest.mark.parity
def test_pefts_own_config_is_validated_as_it_is(model):
    from peft import LoraConfig as Peft

    good = Peft(r=8, lora_alpha=16, target_modules=["q_proj"], target_parameters=EXPERTS, task_type="CAUSAL_LM")
    assert validate_config(good, model) == []
    bad = Peft(r=8, lora_alpha=16, target_modules=["q_proj", "lm_head"], use_dora=True, init_lora_weights="pissa")
    assert {f.key for f in validate_config(bad, model)} == {"use_dora", "init_lora_weights"}
