"""PEFT adapter folders that are built by hand: read to the bit, or refused by file and key; nothing in between."""

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.errors import AdapterFormatError
from support.models import ADAPTER_NAMES
from support.peft_files import (
    CONFIG,
    DOWN,
    EXPERTS,
    GATE_UP,
    ONE_GATE,
    PREFIX,
    Q_A,
    Q_B,
    TINY,
    WEIGHTS,
    Q,
    fused,
    pair,
    read,
    tiny_sites,
    write_adapter,
)
from support.peft_refusals import CONFIG_REFUSALS, TENSOR_REFUSALS


def test_a_hand_built_module_is_read(tmp_path):
    adapter = read(write_adapter(tmp_path / "adapter", Q))
    np.testing.assert_array_equal(adapter.weights[0, "q"].delta(0), 2.0 * (Q[Q_B] @ Q[Q_A]))


def test_ranks_and_scales_may_differ_by_expert(tmp_path):
    tensors = {**pair("0.mlp.experts.0.gate_proj", 16, 12, 1), **pair("0.mlp.experts.2.gate_proj", 16, 12, 5)}
    config = {"target_modules": ["gate_proj"], "rank_pattern": {"experts.2.gate_proj": 5}, "r": 1, "lora_alpha": 3}
    gate = read(write_adapter(tmp_path / "adapter", tensors, **config)).weights[0, "gate"]
    np.testing.assert_array_equal(gate.ranks, [1, 0, 5])
    np.testing.assert_allclose(gate.scale, [3, 0, 3 / 5])
    for expert in (0, 2):
        path = f"{PREFIX}0.mlp.experts.{expert}.gate_proj"
        expected = gate.scale[expert] * (tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"])
        np.testing.assert_allclose(gate.delta(expert), expected, rtol=1e-6)


def test_modules_of_a_dense_mlp_and_the_router_are_read_as_transformers_4_wrote_them(tmp_path):
    tensors = {**pair("1.mlp.up_proj", 16, 20), **pair("0.mlp.gate", 16, 3)}
    adapter = read(write_adapter(tmp_path / "adapter", tensors, target_modules=["up_proj", "gate"]))
    assert set(adapter.weights) == {(1, "mlp_up"), (0, "router")}


@pytest.mark.parametrize("wide", ["A", "B"])
def test_no_side_is_narrowed_to_the_dtype_of_the_other(tmp_path, wide):
    tensors = {k: v if f"lora_{wide}" in k else v.astype(ml_dtypes.bfloat16) for k, v in ONE_GATE.items()}
    gate = read(write_adapter(tmp_path / "adapter", tensors, target_modules=["gate_proj"])).weights[0, "gate"]
    kept = gate.a[1] if wide == "A" else gate.b[1]
    np.testing.assert_array_equal(kept, tensors[f"{PREFIX}0.mlp.experts.1.gate_proj.lora_{wide}.weight"])


def test_experts_in_both_half_precisions_are_held_without_loss(tmp_path):
    tensors = {
        **pair("0.mlp.experts.0.gate_proj", 16, 12, dtype=ml_dtypes.bfloat16),
        **pair("0.mlp.experts.1.gate_proj", 16, 12, dtype=np.float16),
    }
    gate = read(write_adapter(tmp_path / "adapter", tensors, target_modules=["gate_proj"])).weights[0, "gate"]
    for expert in (0, 1):
        key = f"{PREFIX}0.mlp.experts.{expert}.gate_proj.lora_A.weight"
        np.testing.assert_array_equal(gate.a[expert].astype(np.float32), tensors[key].astype(np.float32))


@pytest.mark.parametrize("case", CONFIG_REFUSALS)
def test_a_config_that_is_not_understood_is_refused_by_file_and_field(tmp_path, case):
    fields = CONFIG_REFUSALS[case]
    folder = write_adapter(tmp_path / "adapter", Q, **fields)
    with pytest.raises(AdapterFormatError) as caught:
        read(folder)
    assert str(folder / CONFIG) in str(caught.value)
    # A pattern's value is named by its key in the pattern, which is more exact than the field.
    assert any(name in str(caught.value) for name in ([*fields][-1], "q_proj"))


@pytest.mark.parametrize(
    "fields",
    [{"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"}, {"lora_dropout": 0.1}, {"task_type": "CAUSAL_LM"}],
    ids=["eva", "dropout", "task"],
)
def test_a_field_that_changes_nothing_at_inference_is_accepted(tmp_path, fields):
    assert set(read(write_adapter(tmp_path / "adapter", Q, **fields)).weights) == {(0, "q")}


@pytest.mark.parametrize("case", TENSOR_REFUSALS)
def test_a_tensor_that_is_not_understood_is_refused_by_file_and_key(tmp_path, case):
    tensors, config, pattern = TENSOR_REFUSALS[case]
    folder = write_adapter(tmp_path / "adapter", tensors, **config)
    with pytest.raises(AdapterFormatError, match=pattern) as caught:
        read(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize("target", [{"target_modules": ["q_proj", "o_proj"]}, {"target_parameters": [DOWN]}])
def test_a_target_without_weights_is_refused(tmp_path, target):
    folder = write_adapter(tmp_path / "adapter", Q, **target)
    name = next(iter(target.values()))[-1]
    with pytest.raises(AdapterFormatError, match=name) as caught:
        read(folder)
    assert str(folder / CONFIG) in str(caught.value)
    assert WEIGHTS in str(caught.value)


SQUARE = {"hidden_size": 24}  # 2F = H: shapes say nothing of a gate_up_proj's orientation

ALONE, GATE_UP_ALONE = fused(False, 24, 24), {"target_modules": [], "target_parameters": [GATE_UP]}


def square_gate(folder: Path) -> np.ndarray:
    """Expert 1's update of layer 0's gate, of a model where 2F = H."""
    return read_adapter(folder, tiny_sites(**SQUARE), ADAPTER_NAMES).weights[0, "gate"].delta(1)


def expected_square_gate(tensors: Mapping[str, np.ndarray], transposed: bool, key: str = "mlp.experts") -> np.ndarray:
    """The same by hand: A is expert-major, B's column of rank r and expert e is `r * E + e`; scale 2."""
    a, b = (tensors[f"{PREFIX}0.{key}.lora_{side}.weight"] for side in "AB")
    delta = 2.0 * b[:, [1, 1 + TINY["num_experts"]]] @ a[2:4]
    return (delta.T if transposed else delta)[:12]


@pytest.mark.parametrize(("version", "transposed"), [("0.21.2", False), ("0.19.1", False), ("0.19.0", True)])
def test_a_square_parameter_has_the_orientation_of_the_peft_that_wrote_it(tmp_path, version, transposed):
    folder = write_adapter(tmp_path / "adapter", ALONE, **GATE_UP_ALONE, peft_version=version)
    np.testing.assert_allclose(square_gate(folder), expected_square_gate(ALONE, transposed), rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_square_parameter_has_the_orientation_of_the_other_ones_in_its_file(tmp_path, transposed):
    tensors = {**fused(True, 24, 24), **(fused(False, 24, 12) if transposed else fused(False, 12, 24))}
    folder = write_adapter(tmp_path / "adapter", tensors, **EXPERTS, peft_version=...)
    expected = expected_square_gate(tensors, transposed, "mlp.experts.base_layer")
    np.testing.assert_allclose(square_gate(folder), expected, rtol=1e-5)


@pytest.mark.parametrize("version", [..., "0.19.1.dev0@UNKNOWN", "0.20.0.dev0"])
def test_a_square_parameter_is_refused_with_both_readings_where_nothing_vouches_for_one(tmp_path, version):
    folder = write_adapter(tmp_path / "adapter", ALONE, **GATE_UP_ALONE, peft_version=version)
    with pytest.raises(AdapterFormatError, match=r"experts\.lora_A.*writes today A .* 0\.19\.0 B .*no released"):
        square_gate(folder)


def test_a_square_parameter_is_refused_where_the_version_and_other_shapes_disagree(tmp_path):
    tensors = {**fused(True, 24, 24), **fused(False, 12, 24)}
    folder = write_adapter(tmp_path / "adapter", tensors, **EXPERTS, peft_version="0.19.0")
    with pytest.raises(AdapterFormatError, match=r"base_layer\.lora_A.*orientation.*disagree"):
        square_gate(folder)


def test_missing_files_are_refused_by_name(tmp_path):
    with pytest.raises(AdapterFormatError, match=CONFIG):
        read(tmp_path)
    folder = write_adapter(tmp_path / "adapter", Q)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterFormatError, match=WEIGHTS):
        read(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.bin.*pickle"):
        read(folder)
