"""Unsloth before 2026-09-17 stored B of 3-D experts grouped by expert: both orders are read, unmarked files warn."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, InputError, Model, create_bank, extract, read_adapter, validate
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from jax_moe_lora.cli.generate import Job, load_model
from jax_moe_lora.cli.main import app
from jax_moe_lora.models.config_file import read_model_config
from support.checkpoints import TINY as MODEL
from support.checkpoints import write as write_checkpoint
from support.peft_files import CONFIG, EXPERTS, PREFIX, write_adapter

E, D, F, R = MODEL["num_experts"], MODEL["hidden_size"], MODEL["moe_intermediate_size"], 2
GROUPED, RANK_MAJOR = "grouped_by_expert", "rank_major"
UNSLOTH = {"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"}
NOTE = {"lora_A_layout": GROUPED, "parameters": {"gate_up_proj": {"lora_B_layout": GROUPED, "num_experts": E}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return folder


def per_expert(in_width: int, out_width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(in_width)
    return tuple(random.standard_normal(s).astype(np.float32) for s in ((E, R, in_width), (E, out_width, R)))


GATE_UP, DOWN = per_expert(D, 2 * F), per_expert(F, D)


def write(folder: Path, grouped: bool, transposed: bool = False, **config: Any) -> Path:
    """Both 3-D parameters of layer 0, B's columns in either order, in the orientation of today or of peft 0.19.0."""
    tensors = {}
    for inner, (a, b) in ((".base_layer", GATE_UP), ("", DOWN)):
        if transposed:
            a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
        columns = b.transpose(1, 0, 2) if grouped else b.transpose(1, 2, 0)
        key = f"{PREFIX}0.mlp.experts{inner}"
        tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(a.reshape(E * R, -1))
        tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(columns.reshape(b.shape[1], -1))
    return write_adapter(folder, tensors, **EXPERTS, **config)


def check(adapter: LoRAAdapter) -> None:
    """Every expert has its own update, bit for bit; the scale is 2."""
    for expert in range(E):
        gate_up = 2.0 * (GATE_UP[1][expert] @ GATE_UP[0][expert])
        expected = {"gate": gate_up[:F], "up": gate_up[F:], "down": 2.0 * (DOWN[1][expert] @ DOWN[0][expert])}
        for module, delta in expected.items():
            np.testing.assert_allclose(adapter.weights[0, module].delta(expert), delta, rtol=1e-5, atol=1e-6)


SAID: dict[str, tuple[bool, dict[str, Any], str | None]] = {
    "nothing": (False, {}, None),
    "the field, as today": (False, {"lora_B_layout": RANK_MAJOR}, None),
    "the field": (True, {"lora_B_layout": GROUPED}, None),
    "the field and the note": (True, {"lora_B_layout": GROUPED, "unsloth_fused_expert_lora": NOTE}, None),
    "the note": (
        True,
        {
            "unsloth_fused_expert_lora": {
                "parameters": {part: {"lora_B_layout": GROUPED} for part in ("gate_up_proj", "down_proj")}
            }
        },
        None,
    ),
    "the user": (True, UNSLOTH, GROUPED),
    "the user, against the field": (True, {"lora_B_layout": RANK_MAJOR}, GROUPED),
}


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("transposed", [False, True], ids=["today", "up to 0.19.0"])
def test_unsloths_files_are_read_in_the_order_that_they_or_the_user_say(tmp_path, model, said, transposed):
    grouped, config, by_hand = SAID[said]
    version = {"peft_version": "0.18.1"} if transposed else {}
    folder = write(tmp_path / "adapter", grouped, transposed, **config, **version)
    check(read_adapter(folder, model, lora_b_layout=by_hand))


def test_an_order_that_differs_between_parameters_is_read_for_each(tmp_path, model):
    folder = write(tmp_path / "adapter", grouped=True)
    raw = json.loads((folder / CONFIG).read_text())
    note = {"parameters": {"gate_up_proj": {"lora_B_layout": GROUPED}, "down_proj": {"lora_B_layout": RANK_MAJOR}}}
    (folder / CONFIG).write_text(json.dumps(raw | {"lora_B_layout": "mixed", "unsloth_fused_expert_lora": note}))
    adapter, both = read_adapter(folder, model), read_adapter(folder, model, lora_b_layout=GROUPED)
    np.testing.assert_array_equal(adapter.weights[0, "up"].b, both.weights[0, "up"].b)
    assert (adapter.weights[0, "down"].b != both.weights[0, "down"].b).any()


@pytest.mark.parametrize(
    "config",
    [
        {"lora_B_layout": "by_expert"},
        {"lora_B_layout": "mixed"},
        {"lora_B_layout": RANK_MAJOR, "unsloth_fused_expert_lora": NOTE},
        {"unsloth_fused_expert_lora": {"lora_A_layout": RANK_MAJOR}},
    ],
    ids=["unknown", "mixed without a note", "contradiction", "another order of A"],
)
def test_an_order_that_is_not_known_is_refused_by_its_field(tmp_path, model, config):
    folder = write(tmp_path / "adapter", True, **config)
    with pytest.raises(AdapterFormatError, match=r"lora_[AB]_layout"):
        read_adapter(folder, model)
    assert [f.severity for f in validate(folder, model)][:1] == ["error"]


@pytest.mark.parametrize("points", [UNSLOTH, {"auto_mapping": {"unsloth_fixed": True}}], ids=["name", "auto_mapping"])
def test_validate_warns_of_a_file_of_unsloth_that_does_not_say_its_order(tmp_path, model, points):
    folder = write(tmp_path / "adapter", True, **points)
    (finding,) = validate(folder, model)
    assert (finding.severity, finding.key) == ("warning", "lora_B_layout")
    assert "--lora-b-layout" in finding.message
    assert validate(folder, model, lora_b_layout=GROUPED) == []
    assert validate(write(tmp_path / "marked", True, **points, lora_B_layout=GROUPED), model) == []
    assert validate(write(tmp_path / "peft", False), model) == []


def test_the_order_is_named_by_hand_in_the_api(tmp_path, model):
    folder = write(tmp_path / "adapter", True, **UNSLOTH)
    bank = create_bank({"up": Site(8, 8, 1, (0,))}, num_slots=1, max_rank=1)  # nothing is loaded into it
    served = Model(read_model_config(model), None, bank, model)
    served.register_adapter(folder, "later", lora_b_layout=GROUPED)
    check(served.adapter("later"))
    with pytest.raises(InputError, match="in memory"):
        served.load_adapter(served.adapter("later"), "again", lora_b_layout=GROUPED)
    for call in (served.load_adapter, served.register_adapter):
        with pytest.raises(InputError, match="rank_major or grouped_by_expert"):
            call(folder, "again", lora_b_layout="grouped")


@pytest.mark.slow
def test_generate_loads_an_adapter_in_the_order_that_its_option_names(tmp_path, model):
    folder = write(tmp_path / "adapter", True, **UNSLOTH)
    job = Job("--prompt 1", "a", "old", {})
    adapters = [f"old={folder}", f"older={folder}"]
    served = load_model(str(model), adapters, [job], "float32", 64, "1MiB", [f"older={GROUPED}", GROUPED])
    bank = served.functional(1, 8).bank
    for slot in (0, 1):
        check(extract(bank, slot, "read back"))


def test_the_order_is_named_by_hand_on_the_command_line(tmp_path, model):
    folder = write(tmp_path / "adapter", True, **UNSLOTH)
    command = ["convert", str(folder), str(tmp_path / "out"), "--model", str(model), "--to", "peft"]
    app(args=[*command, "--lora-b-layout", GROUPED], standalone_mode=False)
    check(read_adapter(tmp_path / "out", model))
    assert validate(tmp_path / "out", model) == []  # it says its order now
    app(args=["validate", str(folder), "--model", str(model), "--lora-b-layout", GROUPED], standalone_mode=False)
