"""Messages that look around: what a folder without an adapter holds, and findings that say the same thing once."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, CheckpointError, validate
from jax_moe_lora.adapters.validation.finding import Finding
from jax_moe_lora.adapters.validation.grouping import grouped
from jax_moe_lora.cli.main import main
from jax_moe_lora.inspect import inspect_folder
from support.checkpoints import TINY
from support.checkpoints import write as write_checkpoint
from support.peft_files import CONFIG, EXPERTS, WEIGHTS, Q, fused, pair, read, write_adapter


def deeper(folder: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "sql"):
        write_adapter(folder / name, Q)


def weights_elsewhere(folder: Path) -> None:
    deeper(folder)
    (folder / CONFIG).write_bytes((folder / "sql" / CONFIG).read_bytes())


def renamed(folder: Path) -> None:
    write_adapter(folder, Q)
    (folder / WEIGHTS).rename(folder / "adapter.safetensors")


def two_other_files(folder: Path) -> None:
    renamed(folder)
    (folder / "model.safetensors").write_bytes(b"")


def weights_alone(folder: Path) -> None:
    write_adapter(folder, Q)
    (folder / CONFIG).unlink()


def a_model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def config_alone(folder: Path) -> None:
    write_adapter(folder, Q)
    (folder / WEIGHTS).unlink()


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "one folder deeper": (
        deeper,
        r"adapter_config\.json is not found in .*, which holds .*checkpoint-9, .*checkpoint-10 and .*sql: give one of",
    ),
    "weights one folder deeper": (weights_elsewhere, r"safetensors is not found in .*, which holds .*checkpoint-9, "),
    "another file name": (
        renamed,
        r"adapter_model\.safetensors is not found in .*, which holds adapter\.safetensors: rename it, if it is the",
    ),
    "two other file names": (
        two_other_files,
        r"holds adapter\.safetensors and model\.safetensors: rename the one that",
    ),
    "no config": (
        weights_alone,
        r"adapter_config\.json is not found in .*, which holds adapter_model\.safetensors; weig",
    ),
    "a model": (a_model, r"holds a model, not an adapter"),
    "no weights": (config_alone, r"adapter_model\.safetensors is not found in .*, which holds adapter_config\.json\."),
    "nothing": (lambda _: None, r"adapter_config\.json is not found in .*, which is empty\."),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_without_an_adapter_says_what_is_there(tmp_path, case):
    make, message = FOLDERS[case]
    folder = tmp_path / "out"
    folder.mkdir()
    make(folder)
    with pytest.raises(AdapterFormatError, match=message):
        read(folder)
    write_checkpoint(tmp_path / "model")
    first, *others = validate(folder, tmp_path / "model")
    assert re.search(message, first.message)
    assert all("not found" not in finding.message for finding in others)


def test_inspect_also_names_the_adapters_one_folder_deeper(tmp_path):
    deeper(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-9, .*checkpoint-10, .*sql"):
        inspect_folder(tmp_path)


def test_a_missing_folder_is_not_there(tmp_path):
    with pytest.raises(AdapterFormatError, match="There is no folder"):
        read(tmp_path / "gone")


LAYERS, EXPERTS_OF_A_LAYER = 4, 6


def test_validate_groups_its_findings(tmp_path, monkeypatch, capsys):
    """One width is wrong in every expert of every layer: one line for gate and up, and one for down."""
    write_checkpoint(tmp_path / "model", num_hidden_layers=LAYERS, num_experts=EXPERTS_OF_A_LAYER, mlp_only_layers=[])
    d, f = TINY["hidden_size"], TINY["moe_intermediate_size"]
    tensors: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS_OF_A_LAYER):
            for module, widths in (("gate", (d + 1, f)), ("up", (d + 1, f)), ("down", (f, d + 1))):
                tensors |= pair(f"{layer}.mlp.experts.{expert}.{module}_proj", *widths)
    folder = write_adapter(tmp_path / "adapter", tensors, target_modules=["gate_proj", "up_proj", "down_proj"])
    down, gate_up = validate(folder, tmp_path / "model")
    assert len(gate_up.keys) == 2 * LAYERS * EXPERTS_OF_A_LAYER
    assert len(down.keys) == LAYERS * EXPERTS_OF_A_LAYER
    assert (gate_up.found, gate_up.expected) == (f"[2, {d + 1}]", f"[2, {d}]")
    assert gate_up.message.endswith(
        "The same holds for 47 others: layers 0-3, experts 0-5, gate_proj and up_proj, lora_A."
    )
    assert down.message.endswith("The same holds for 23 others: layers 0-3, experts 0-5, down_proj, lora_B.")
    monkeypatch.setattr(sys, "argv", ["jax-moe-lora", "validate", str(folder), "--model", str(tmp_path / "model")])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[-1].endswith("2 errors, 0 warnings")


def test_full_names_that_lack_weights_are_one_finding(tmp_path):
    write_checkpoint(tmp_path / "model")
    names = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkvo"]
    folder = write_adapter(tmp_path / "adapter", pair("0.self_attn.q_proj", 16, 24), target_modules=names)
    error, warning = validate(folder, tmp_path / "model")
    assert error.keys == tuple(names[1:])
    assert len(warning.keys) == len(names) - 1
    assert "layers 0-1, k_proj, v_proj, o_proj and q_proj" in error.message


def test_findings_that_differ_stay_apart():
    same = [
        Finding("error", "file", f"layers.{layer}.x.lora_A.weight", "16", "17", f"layers.{layer}.x.lora_A.weight: bad.")
        for layer in (0, 2)
    ]
    others = [
        Finding("warning", *("file", "layers.1.x.lora_A.weight", "16", "17", "layers.1.x.lora_A.weight: bad.")),
        Finding("error", *("file", "layers.1.x.lora_A.weight", "16", "18", "layers.1.x.lora_A.weight: bad.")),
        Finding("error", *("file", "layers.1.x.lora_A.weight", "16", "17", "layers.1.x.lora_A.weight: worse.")),
    ]
    first, *rest = grouped([same[0], *others, same[1]])
    assert rest == others
    assert first.message == "layers.0.x.lora_A.weight: bad. The same holds for 1 other: layers 0, 2, x, lora_A."


def test_wrappers_of_all_layers_are_one_finding(tmp_path):
    """The same fault in 3-D parameters, whose keys name no expert."""
    write_checkpoint(tmp_path / "model", mlp_only_layers=[])
    experts = TINY["num_experts"]
    tensors = {k: v for layer in (0, 1) for k, v in pair(f"{layer}.mlp.experts", 12, 17, 2 * experts).items()}
    tensors |= {k: v for layer in (0, 1) for k, v in fused(True, 16, 24, layer=layer).items()}
    (finding,) = validate(write_adapter(tmp_path / "adapter", tensors, **EXPERTS), tmp_path / "model")
    assert "layers 0-1, experts, lora_B" in finding.message
