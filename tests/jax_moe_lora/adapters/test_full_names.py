"""Full names of all projections in a config, as NeMo exports them: the work grows with their number, not its square."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_moe_lora.adapters.formats.adapter_file import AdapterFile, pair_keys
from jax_moe_lora.adapters.formats.config_reading import peft_config_of
from jax_moe_lora.adapters.formats.detect import read_weights
from jax_moe_lora.adapters.formats.patterns import PatternTable
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.formats.weights import open_weights
from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.adapters.validation.hints import hints
from support.models import ADAPTER_NAMES
from support.peft_files import WEIGHTS

WIDTHS = {"gate": (2, 3), "up": (2, 3), "down": (3, 2)}


class Name(str):
    """A name that counts how often it is compared with another one that is not the same object's hash bucket."""

    comparisons = 0
    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        Name.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def write(folder: Path, layers: int, experts: int) -> dict[str, Site]:
    """Weights of every expert of every layer, of rank 1; returns the model's projections."""
    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for expert in range(experts):
            for module, (in_width, out_width) in WIDTHS.items():
                key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{module}_proj"
                tensors[f"{key}.lora_A.weight"] = np.ones((1, in_width), np.float32)
                tensors[f"{key}.lora_B.weight"] = np.ones((out_width, 1), np.float32)
    save_file(tensors, folder / WEIGHTS)
    return {module: Site(*widths, experts, tuple(range(layers))) for module, widths in WIDTHS.items()}


def config_fields(layers: int, experts: int, kind: str) -> dict[str, Any]:
    names = [
        Name(f"model.layers.{layer}.mlp.experts.{expert}.{module}_proj")
        for layer in range(layers)
        for expert in range(experts)
        for module in WIDTHS
    ]
    fields: dict[str, Any] = {"r": 1, "lora_alpha": 1, "target_modules": names}
    if kind == "patterns":
        fields |= {"rank_pattern": dict.fromkeys(names, 1), "alpha_pattern": dict.fromkeys(names, 2)}
    if kind == "exclusions":
        fields |= {"exclude_modules": [Name(f"{name}.other") for name in names]}
    if kind == "escaped patterns":
        fields |= {"rank_pattern": dict.fromkeys([name.replace(".", r"\.") for name in names], 1)}
    return fields


def work(call: Callable[[], object]) -> int:
    """Calls of functions, Python's and C's, and comparisons of names; a machine's speed plays no part."""
    calls, Name.comparisons = 0, 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return calls + Name.comparisons


def reading_work(folder: Path, layers: int, experts: int, kind: str) -> int:
    sites, fields = write(folder, layers, experts), config_fields(layers, experts, kind)

    def read() -> None:
        problems = Problems()
        config = peft_config_of(fields, "the config", problems)
        with open_weights(folder) as tensors:
            file = AdapterFile(tensors.path, config, sites, ADAPTER_NAMES, tensors, problems)
            weights = read_weights(file, pair_keys(tensors.path, tensors.infos, problems))
            assert hints(file) == []
        assert len(weights) == layers * len(WIDTHS)

    return work(read)


@pytest.mark.parametrize("kind", ["targets", "patterns", "exclusions", "escaped patterns"])
def test_full_names_of_all_projections_cost_linear_work(tmp_path, kind):
    reading_work(tmp_path / "warm", 1, 1, kind)
    small = reading_work(tmp_path / "small", 4, 8, kind)
    large = reading_work(tmp_path / "large", 4, 32, kind)
    assert large < 4.5 * small


def test_a_table_of_patterns_finds_what_peft_finds_one_by_one():
    """PEFT tries the patterns in their order: `re.match(rf"(.*\\.)?({pattern})$", key)`."""

    patterns = [
        "gate_proj",
        r"experts\.1\.up_proj",
        "0.mlp.experts.1.up_proj",
        r"layers\.[01]\..*",
        "gate.proj",
        "x",
        "a|b",
    ]
    table = PatternTable({pattern: index for index, pattern in enumerate(patterns)})
    keys = ["model.layers.0.mlp.experts.1.up_proj", "model.layers.0.mlp.experts.1.gate_proj", "gate_proj", "gateXproj"]
    keys += [
        "model.layers.2.mlp.gate_proj",
        "agate_proj",
        "model.x",
        "x",
        "xx",
        "model.b",
        "layers.1.",
        "experts-1-up_proj",
    ]
    for key in keys:
        expected = {i for i, p in enumerate(patterns) if re.match(rf"(.*\.)?({p})$", key)}
        assert table.matching(key) == expected, key
        assert table.value([key], None) == min(expected, default=None)
