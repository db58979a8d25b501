"""Right files that were turned away: configs as tools write them, sharded weights, targets that could never match."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_moe_lora import AdapterFormatError
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.formats.neutral_fields import NEUTRAL
from jax_moe_lora.adapters.formats.regex_guard import is_safe
from jax_moe_lora.adapters.pool.content import newer_version, stamps, version
from support.models import ADAPTER_NAMES
from support.peft_files import (
    BOTH,
    CONFIG,
    DOWN,
    EXPERTS,
    GATE_UP,
    ONE_GATE,
    PREFIX,
    TINY,
    WEIGHTS,
    Q,
    read,
    tiny_sites,
    write_adapter,
)

INDEX = "adapter_model.safetensors.index.json"
MLP = ["gate_proj", "up_proj", "down_proj"]
ROUTED = {"mlp_only_layers": []}


def modules(folder: Path, **overrides: Any) -> set[tuple[int, str]]:
    """What is read for a model without dense layers, unless told otherwise."""
    return set(read_adapter(folder, tiny_sites(**(ROUTED | overrides)), ADAPTER_NAMES).weights)


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({**Q, **BOTH}, {"target_modules": ["q_proj", *MLP], "target_parameters": [GATE_UP, DOWN]}),
        (Q, {"target_modules": ["q_proj", *MLP]}),
        (Q, {"target_modules": r".*\.(q_proj|gate_proj|up_proj|down_proj)"}),
        (Q, {"target_modules": ["q_proj", *(f"model.layers.0.mlp.experts.0.{part}" for part in MLP)]}),
    ],
    ids=["3-D experts", "attention alone", "regex", "full names"],
)
def test_names_that_could_never_match_a_3d_expert_are_passed_over(tmp_path, tensors, config):
    assert (0, "q") in modules(write_adapter(tmp_path / "adapter", tensors, **config))


MISSING: dict[str, tuple[Mapping[str, np.ndarray], dict[str, Any], dict[str, Any]]] = {
    "a projection of attention": (Q, {"target_modules": ["q_proj", "o_proj"]}, ROUTED),
    "a dense layer beside 3-D experts": (
        {**Q, **BOTH},
        {"target_modules": ["q_proj", "up_proj"], "target_parameters": [GATE_UP, DOWN]},
        {"mlp_only_layers": [1]},
    ),
    "an expert's projection beside experts as modules": (
        ONE_GATE,
        {"target_modules": ["gate_proj", "up_proj"]},
        ROUTED,
    ),
    "a 3-D parameter": (Q, {"target_modules": ["q_proj"], "target_parameters": [DOWN]}, ROUTED),
}


@pytest.mark.parametrize("case", MISSING)
def test_missing_weights_are_still_refused_by_the_targets_name(tmp_path, case):
    tensors, config, overrides = MISSING[case]
    target = (config.get("target_parameters") or config["target_modules"])[-1]
    target = "up_proj" if "up_proj" in config["target_modules"] else target
    with pytest.raises(AdapterFormatError, match=rf"targets '{target}'.*holds no weights"):
        modules(write_adapter(tmp_path / "adapter", tensors, **config), **overrides)


ACCEPTED: dict[str, dict[str, Any]] = {
    "a null initialisation": {"init_lora_weights": None},
    "an initialisation in capitals": {"init_lora_weights": "Gaussian"},
    "a rank of 2.0": {"r": 2.0},
    "a rank of 2.0 in a pattern": {"r": 7, "rank_pattern": {"q_proj": 2.0}},
    "a layer 0.0": {"layers_to_transform": [0.0]},
    "a null peft_type": {"peft_type": None},
    "an empty bias": {"bias": ""},
    "a false rslora as a number": {"use_rslora": 0},
    **{f"unknown and {value!r}": {"from_the_future": value} for value in (None, False, 0, 0.0, "", " ", [], {})},
    "unknown and empty inside": {"from_the_future": {"a": None, "b": [], "c": {"d": ""}}},
    "a note": {"_comment": "made by hand"},
    **{f"{name}": {name: "whatever"} for names in NEUTRAL.values() for name in names if name != "peft_type"},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_field_that_says_nothing_or_changes_nothing_is_accepted(tmp_path, case):
    adapter = read(write_adapter(tmp_path / "adapter", Q, **ACCEPTED[case]))
    weights = adapter.weights[0, "q"]
    assert weights.max_rank == 2
    np.testing.assert_array_equal(weights.delta(0), read(write_adapter(tmp_path / "same", Q)).weights[0, "q"].delta(0))


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 2.5},
        {"rank_pattern": {"q_proj": 2.5}},
        {"from_the_future": [0]},
        {"from_the_future": {"a": 1}},
        {"trainable_token_indices": [0]},
        {"alora_invocation_tokens": [0]},
        {"init_lora_weights": "mica"},
    ],
    ids=str,
)
def test_a_value_that_would_change_something_is_refused_by_name(tmp_path, fields):
    folder = write_adapter(tmp_path / "adapter", Q, **fields)
    with pytest.raises(AdapterFormatError, match=next(iter(fields))):
        read(folder)


def test_a_byte_order_mark_is_no_part_of_a_config(tmp_path):
    folder = write_adapter(tmp_path / "adapter", Q)
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    assert set(read(folder).weights) == {(0, "q")}


@pytest.mark.parametrize(
    "pattern",
    [
        r"(model\.){1}layers\.\d{1,3}\.(self_attn|mlp)\.q_proj",
        r"(?:\w+\.){1,5}q_proj",
        r"(?:[a-z]+\.){2}(?:\d\.){1}(self_attn\.)?(q|k){1,1}_proj",
        r"model\.(layers\.\d+\.){1,2}self_attn\.q_proj",
    ],
)
def test_a_bounded_repeated_group_is_no_danger(tmp_path, pattern):
    assert set(read(write_adapter(tmp_path / "adapter", Q, target_modules=pattern)).weights) == {(0, "q")}


@pytest.mark.parametrize("pattern", [r"(.*){9}x", r"(a|aa){30}", r"((a?){5}){6}", r"(x+x+){5}", r"(\w+\.?){2,}!"])
def test_a_bounded_group_that_takes_as_long_as_an_endless_one_is_not_safe(pattern):
    assert not is_safe(pattern)


def shards(folder: Path, tensors: Mapping[str, np.ndarray]) -> Path:
    """The same adapter in a file for each tensor, with an index."""
    write_adapter(folder, {}, **EXPERTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for number, (key, tensor) in enumerate(tensors.items(), 1):
        weight_map[key] = f"adapter_model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({key: tensor}, folder / weight_map[key])
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def test_sharded_weights_with_an_index_are_read_as_one_file(tmp_path):
    whole = read(write_adapter(tmp_path / "whole", BOTH, **EXPERTS))
    sharded = read(shards(tmp_path / "sharded", BOTH))
    assert sharded.weights.keys() == whole.weights.keys()
    for key, weights in whole.weights.items():
        np.testing.assert_array_equal(sharded.weights[key].a, weights.a)
        np.testing.assert_array_equal(sharded.weights[key].b, weights.b)


def test_one_whole_file_beside_a_stale_index_is_read(tmp_path):
    folder = shards(tmp_path / "adapter", BOTH)
    for shard in folder.glob("adapter_model-*"):
        shard.unlink()
    save_file(dict(BOTH), folder / WEIGHTS)
    assert set(read(folder).weights) == {(0, "gate"), (0, "up"), (0, "down")}


SHARD_FAULTS = {
    "gone": (lambda folder: next(folder.glob("*-00002-*")).unlink(), "00002"),
    "cut": (lambda folder: next(folder.glob("*-00002-*")).write_bytes(b"123"), "00002.*truncated"),
    "outside": (lambda folder: rename(folder, "../x.safetensors"), "same folder"),
    "another file": (lambda folder: rename(folder, "adapter_model-00001-of-00004.safetensors"), "does not hold it"),
    "no map": (lambda folder: (folder / INDEX).write_text('{"weight_map": []}'), "no weight_map"),
}


def rename(folder: Path, shard: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][list(BOTH)[-1]] = shard
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_an_index_that_disagrees_with_its_files_is_refused_by_name(tmp_path, fault):
    folder = shards(tmp_path / "adapter", BOTH)
    break_it, message = SHARD_FAULTS[fault]
    break_it(folder)
    with pytest.raises(AdapterFormatError, match=message):
        read(folder)


def test_a_shard_that_changes_is_a_new_version_of_the_adapter(tmp_path):
    folder = shards(tmp_path / "adapter", BOTH)
    before = version(folder)
    assert len(stamps(folder)) == 2 + len(BOTH)
    assert newer_version(folder, before) is None
    shard = sorted(folder.glob("*-00002-*"))[0]
    (key,) = [key for key, name in json.loads((folder / INDEX).read_text())["weight_map"].items() if name == shard.name]
    save_file({key: BOTH[key] + 1}, shard)
    after = newer_version(folder, before)
    assert after is not None
    assert after.digest != before.digest


def test_a_layout_file_may_have_further_keys_at_its_top(tmp_path):
    random = np.random.default_rng(0)
    tensors = {
        f"{PREFIX}0.mlp.experts.moe_h_to_4h.lora_{side}.weight": random.standard_normal(shape).astype("f4")
        for side, shape in (("A", (1, 2, 16)), ("B", (TINY["num_experts"], 12, 2)))
    }
    folder = write_adapter(tmp_path / "adapter", tensors, target_modules=...)
    declared = {"version": 1, "moe_shared_outer": {"moe_h_to_4h": {"shared_side": "A"}}}
    (folder / "lora_layout.json").write_text(json.dumps(declared | {"generator": "x", "created": 1, "other": {"a": 1}}))
    assert read(folder).weights[0, "gate"].a.shape == (1, 2, 16)
