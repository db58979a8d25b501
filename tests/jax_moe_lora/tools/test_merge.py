"""Merged checkpoints compute what base and adapter do, take little memory, and appear whole or not at all."""

import json
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_moe_lora import AdapterFormatError, CheckpointError, InputError, LoRAAdapter, Model, merge_adapter
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.lora import uniform
from jax_moe_lora.cli.main import main
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import adapter_sites
from support.checkpoints import write as write_checkpoint
from support.interruptions import killed_at
from support.layers import assert_close
from support.memory import peak_memory
from support.networks import (
    ATTENTION,
    EXPERTS,
    FIRST,
    TINY,
    load_peft,
    peft_logits,
    save_model,
    save_random_adapter,
    tiny,
)

pytestmark = [pytest.mark.parity, pytest.mark.xdist_group("merge")]

TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 12))
INDEX = "model.safetensors.index.json"
DENSE_MLP = [f"layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
SHARED_EXPERT = [f"shared_expert.{part}_proj" for part in ("gate", "up", "down")]
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"target_parameters": [*EXPERTS, "mlp.gate.weight", *DENSE_MLP]},
    "qwen2_moe": {
        "target_modules": [*ATTENTION, *SHARED_EXPERT, "shared_expert_gate"],
        "target_parameters": [*EXPERTS, "mlp.gate.weight"],
    },
    "mixtral": {"target_parameters": [*EXPERTS, "mlp.gate.weight"]},
    "olmoe": {"target_parameters": [*EXPERTS, "mlp.gate.weight"]},
}


def read(adapter: Path, base: Path) -> LoRAAdapter:
    config = read_model_config(base)
    return read_adapter(adapter, adapter_sites(config), adapter_names(config))


def transformers_logits(folder: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor(TOKENS)).logits.numpy()


@pytest.fixture(scope="module", params=FIRST)
def trained(request, tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint, and an adapter of PEFT's on all that its family has."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    own = {"mlp_only_layers": [1]} if name == "qwen3_moe" else {}
    base = save_model(tiny(name, num_hidden_layers=2, **own), folder / "model")
    config = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, **CONFIGS[name]}
    return base, save_random_adapter(base, folder / "adapter", **config)


def test_transformers_computes_with_a_merged_checkpoint_what_peft_does_after_merging(trained, tmp_path):
    base, adapter = trained
    merge_adapter(read(adapter, base), base, tmp_path / "out", max_shard_size="100KB")
    import torch

    with torch.no_grad():
        expected = load_peft(base, adapter).merge_and_unload()(torch.tensor(TOKENS)).logits.numpy()
    found = transformers_logits(tmp_path / "out")
    assert_close(found, expected, 1e-5)
    change = np.linalg.norm(expected - peft_logits(base, None, TOKENS)) / np.linalg.norm(expected)
    assert change > 1e-2, "the adapter changes nothing; this proves nothing"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, LoRAAdapter]:
    """A checkpoint in bfloat16 of one layer, with a tokenizer and other files, and an adapter on two experts' gate."""
    base = save_model(tiny("qwen3_moe", num_hidden_layers=1).bfloat16(), tmp_path_factory.mktemp("small") / "m")
    shutil.copyfile(data_folder() / "model" / "tokenizer.json", base / "tokenizer.json")
    (base / "LICENSE").write_text("anyone may")
    (base / "pytorch_model.bin").write_bytes(b"weights in another form")
    random = np.random.default_rng(0)
    gate = uniform(
        random.standard_normal((1, 2, 64), dtype=np.float32),
        random.standard_normal((8, 24, 2), dtype=np.float32),
        0.5,
        8,
    )
    gate.ranks[2:] = 0
    return base, LoRAAdapter("mine", {(0, "gate"): gate})


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


GATE = "model.layers.0.mlp.experts.{}.gate_proj.weight"


def test_sums_are_float32s_and_what_the_adapter_leaves_alone_keeps_its_bits(small, tmp_path):
    base, adapter = small
    merge_adapter(adapter, base, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    gate = adapter.weights[0, "gate"]
    for name, old in before.items():
        expert = next((e for e in (0, 1) if name == GATE.format(e)), None)
        if expert is not None:
            old = (old.astype(np.float32) + np.float32(0.5) * (gate.b[expert] @ gate.a[0])).astype(ml_dtypes.bfloat16)
            assert not np.array_equal(before[name], old)
        np.testing.assert_array_equal(after[name], old, err_msg=name)
    copied = {"config.json", "generation_config.json", "tokenizer.json", "LICENSE"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", *copied}
    assert all((tmp_path / "out" / name).read_bytes() == (base / name).read_bytes() for name in copied)


def test_shards_hold_what_fits_and_the_index_says_where(small, tmp_path):
    base, adapter = small
    merge_adapter(adapter, base, tmp_path / "out", max_shard_size=20_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, 1 + len(shards))
    ]
    held = {path.name: load_file(path) for path in shards}
    assert {name: shard for shard, own in held.items() for name in own} == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for own in held.values() for t in own.values())
    assert len(shards) > 5
    assert all(len(own) == 1 or sum(t.nbytes for t in own.values()) <= 20_000 for own in held.values())


def test_a_dtype_is_that_of_every_tensor_and_of_the_config(small, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    base, adapter = small
    merge_adapter(adapter, base, tmp_path / "out", dtype="float32")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {np.dtype(np.float32)}
    gate = adapter.weights[0, "gate"]
    expected = before[GATE.format(1)].astype(np.float32) + np.float32(0.5) * (gate.b[1] @ gate.a[0])
    np.testing.assert_array_equal(after[GATE.format(1)], expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_what_cannot_be_merged_is_refused_and_nothing_is_left(small, tmp_path):
    base, adapter = small
    gate = adapter.weights[0, "gate"]
    large = LoRAAdapter("mine", {(0, "gate"): uniform(gate.a, gate.b * 1e5, 1e3, 8)})
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight .* is not finite in float16"):
        merge_adapter(large, base, tmp_path / "out", dtype="float16")
    with pytest.raises(AdapterFormatError, match="layer 1, gate: the model has no gate in this layer"):
        merge_adapter(LoRAAdapter("mine", {(1, "gate"): gate}), base, tmp_path / "out")
    with pytest.raises(InputError, match="dtype is 'int8'"):
        merge_adapter(adapter, base, tmp_path / "out", dtype="int8")
    with pytest.raises(InputError, match="there is no folder"):
        merge_adapter(adapter, base, tmp_path / "no" / "out")
    broken = shutil.copytree(base, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no safetensors file")
    with pytest.raises(CheckpointError, match="cannot be read as a safetensors file"):
        merge_adapter(adapter, broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.slow
def test_a_merge_takes_the_memory_of_a_shard_at_most(tmp_path):
    """A checkpoint of 104 MB in two files, merged into shards of 32 MiB; its largest tensor has 4 MiB."""
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 1024, "num_hidden_layers": 1, "num_experts": 8}
    held = write_checkpoint(tmp_path / "model", **sizes, mlp_only_layers=[], vocab_size=99, head_dim=64)
    size, largest = sum(tensor.nbytes for tensor in held.values()), max(tensor.nbytes for tensor in held.values())
    del held
    zero = np.zeros((8, 1024, 1), np.float32)
    adapter = LoRAAdapter("mine", {(0, "gate"): uniform(np.ones((1, 1, 1024), np.float32), zero, 1.0, 8)})
    merge = partial(merge_adapter, adapter, tmp_path / "model", tmp_path / "out", max_shard_size="32MiB")
    peak = peak_memory(merge)
    assert peak >= largest, "the measurement misses the tensors"
    assert peak <= 32 * 2**20 < size / 3, f"{peak} bytes at once, of a checkpoint of {size}"


def test_a_merge_that_is_killed_leaves_nothing_and_the_next_one_ends(small, tmp_path):
    base, adapter = small
    merge = partial(merge_adapter, adapter, base, tmp_path / "out", max_shard_size="50KB")
    for n in (2, 5, 9):
        assert killed_at(n, tmp_path, merge) == -signal.SIGKILL
        assert [path.name for path in tmp_path.iterdir()] in ([], [".out.partial"])
    merge()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()


# The command line.

BASE, UPPER = data_folder() / "model", data_folder() / "adapters" / "upper"


def run(monkeypatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["jax-moe-lora", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return done.value.code or 0


def test_convert_writes_a_layout_and_says_what_it_copied(monkeypatch, capsys, tmp_path):
    convert = ("convert", UPPER, tmp_path / "out", "--model", BASE, "--to", "peft-per-expert")
    assert run(monkeypatch, *convert) == 2
    assert "gate and up hold one A, which this layout cannot say; expand writes copies" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert run(monkeypatch, *convert, "--expand") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: peft-per-expert, ")
    assert lines[1:] == ["A of gate and up, which is one matrix, was written twice."]
    assert run(monkeypatch, *convert, "--expand") == 2
    assert "exists; name a new folder" in capsys.readouterr().err
    assert run(monkeypatch, *convert, "--expand", "--force") == 0
    own_place = ("convert", tmp_path / "out", tmp_path / "out", "--model", BASE, "--to", "peft-per-expert", "--force")
    assert run(monkeypatch, *own_place) == 0
    own, found = read(UPPER, BASE), read(tmp_path / "out", BASE)
    assert own.weights.keys() == found.weights.keys()
    for key, weights in own.weights.items():
        for expert in range(len(weights.ranks)):
            np.testing.assert_array_equal(found.weights[key].delta(expert), weights.delta(expert))


@pytest.mark.slow
def test_merge_writes_a_model_that_answers_as_the_adapter_does(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "merge", UPPER, tmp_path / "out", "--model", BASE, "--dtype", "float32") == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: merged, ")
    model = Model.from_pretrained(tmp_path / "out", dtype="float32", max_adapters=1, max_rank=1)
    assert model.generate(["abc>"], max_new_tokens=8)[0].text == "ABC"
    assert run(monkeypatch, "merge", UPPER, tmp_path / "out", "--model", BASE, "--max-shard-size", "lots") == 2
    assert "Size 'lots' is not understood" in capsys.readouterr().err
