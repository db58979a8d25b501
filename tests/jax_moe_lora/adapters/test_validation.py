"""`validate` finds an error exactly where loading raises one, finds all of them at once, and reads headers alone."""

import dataclasses
import json
import shutil
import sys
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jax_moe_lora import Finding, InputError, JaxMoELoRAError, create_bank, validate
from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.cli.main import main
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.files import safetensors_io
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.tools.validate import validate_folders
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
    fused,
    pair,
    tiny_sites,
    write_adapter,
)
from support.peft_refusals import CONFIG_REFUSALS, TENSOR_REFUSALS

MODEL_CONFIG = {"model_type": "qwen3_moe", "hidden_act": "silu", "max_position_embeddings": 64, **TINY}
SIDECAR = "lora_layout.json"


def stack(part: str, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> dict[str, np.ndarray]:
    """A and B of all experts of layer 0 in one tensor a side."""
    random = np.random.default_rng(3)
    shapes = {"A": shape_a, "B": shape_b}
    return {
        f"{PREFIX}0.mlp.experts.{part}.lora_{side}.weight": random.standard_normal(shape).astype(np.float32)
        for side, shape in shapes.items()
    }


TINKER = {**stack("w1", (1, 2, 16), (3, 12, 2)), **stack("w2", (3, 2, 12), (1, 16, 2))}
SGLANG = stack("gate_up_proj", (1, 2, 16), (3, 24, 2))
TRTLLM = stack("moe_h_to_4h", (1, 2, 16), (3, 12, 2))
SHARED_A = {"version": 1, "moe_shared_outer": {"moe_h_to_4h": {"shared_side": "A"}}}
SHARED_B = {"version": 1, "moe_shared_outer": {"moe_h_to_4h": {"shared_side": "B"}}}
NO_TARGETS = {"target_modules": ...}
GOOD: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], Any]] = {
    "attention": (Q, {}, None),
    "attention_and_mlp": ({**Q, **pair("1.mlp.up_proj", 16, 20)}, {"target_modules": ["q_proj", "up_proj"]}, None),
    "fused": (BOTH, EXPERTS, None),
    "transposed": ({**fused(True, 24, 16), **fused(False, 16, 12)}, {**EXPERTS, "peft_version": "0.18.0"}, None),
    "down_alone": (fused(False, 12, 16), {"target_modules": [], "target_parameters": [DOWN]}, None),
    "one_expert": (ONE_GATE, {"target_modules": ["gate_proj"]}, None),
    "tinker": (TINKER, NO_TARGETS, None),
    "sglang": (SGLANG, NO_TARGETS, None),
    "trtllm": (TRTLLM, NO_TARGETS, None),
    "trtllm_and_sidecar": (TRTLLM, NO_TARGETS, SHARED_A),
}
# Past what the readers' own tables have: files that meet the sidecar, the bank, or values.
SERVED_BAD: dict[str, tuple[dict[str, np.ndarray], dict[str, Any], Any]] = {
    "sidecar_denies": (TRTLLM, NO_TARGETS, {"version": 1}),
    "sidecar_version": (TRTLLM, NO_TARGETS, {"version": 2}),
    "sidecar_side": (TRTLLM, NO_TARGETS, {"moe_shared_outer": {"moe_gate": "A"}}),
    "sidecar_is_no_object": (TRTLLM, NO_TARGETS, []),
    "sidecar_and_copies_that_differ": (TRTLLM, NO_TARGETS, SHARED_B),
    "rank_above_the_banks": (pair("0.self_attn.q_proj", 16, 32, 65), {"r": 65}, None),
    "nan": ({k: np.where(np.arange(v.shape[1]) == 1, np.nan, v).astype("f4") for k, v in Q.items()}, {}, None),
    "past_bfloat16": ({k: np.full_like(v, 3.4e38) for k, v in Q.items()}, {}, None),
    "no_tensors": ({}, {}, None),
    "two_layouts": ({**TINKER, **TRTLLM}, NO_TARGETS, None),
    "held_twice": ({**TINKER, **SGLANG}, NO_TARGETS, None),
    "wrapper_of_three_dimensions": ({k: v[None] for k, v in BOTH.items()}, EXPERTS, None),
    "wrapper_of_one_dimension": ({k: v[0] for k, v in BOTH.items()}, EXPERTS, None),
    "scale_past_float32": (Q, {"lora_alpha": 1e30, "alpha_pattern": {"q_proj": 1e31}}, None),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
    return folder


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    return create_bank(tiny_sites(), num_slots=1, max_rank=64)


def write(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any], sidecar: Any) -> Path:
    write_adapter(folder, tensors, **config)
    if sidecar is not None:
        (folder / SIDECAR).write_text(json.dumps(sidecar))
    return folder


def load(folder: Path, bank: AdapterBank) -> tuple[int | None, str | None]:
    """Bytes in the bank, or what loading raises."""
    try:
        return bank.nbytes_of(read_adapter(folder, tiny_sites(), ADAPTER_NAMES)), None
    except JaxMoELoRAError as error:
        return None, str(error)


def errors(findings: list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.severity == "error"]


def keys(finding: Finding) -> tuple[str, ...]:
    return finding.keys or (finding.key,)


def places(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.file, key) for finding in findings for key in keys(finding)}


def check_agreement(folder: Path, model: Path, bank: AdapterBank) -> list[Finding]:
    """An error if and only if loading raises, and what it raises is among them; headers alone find no other ones."""
    deep, shallow = errors(validate(folder, model, deep=True)), errors(validate(folder, model))
    report = validate_folders(folder, model, False, max_rank=64, dtype="bfloat16")
    nbytes, raised = load(folder, bank)
    assert bool(deep) == (raised is not None), f"loading raises {raised}, validation finds {deep}"
    # The bank's own sentences name the adapter, the layer and the side, a finding the file and the key.
    sentence = (raised or "").rpartition(": ")[2].removeprefix("A ").removeprefix("B ")
    assert raised is None or any(sentence in finding.message for finding in deep), raised
    assert raised is not None or report.bank_bytes == nbytes
    assert places(shallow) <= places(deep)
    assert all(str(folder) in finding.message and finding.file.startswith(str(folder)) for finding in deep)
    return deep


@pytest.mark.parametrize("case", GOOD)
def test_a_good_adapter_has_no_findings(tmp_path, model, bank, case):
    folder = write(tmp_path / "adapter", *GOOD[case])
    assert check_agreement(folder, model, bank) == []
    assert validate(folder, model, deep=True) == []


@pytest.mark.parametrize("case", SERVED_BAD)
def test_what_sidecar_bank_or_values_forbid_is_an_error(tmp_path, model, bank, case):
    assert check_agreement(write(tmp_path / "adapter", *SERVED_BAD[case]), model, bank)


@pytest.mark.parametrize("case", CONFIG_REFUSALS)
def test_a_config_that_loading_refuses_is_an_error_by_its_field(tmp_path, model, bank, case):
    found = check_agreement(write_adapter(tmp_path / "adapter", Q, **CONFIG_REFUSALS[case]), model, bank)
    assert [(Path(f.file).name, f.key) for f in found] == [(CONFIG, [*CONFIG_REFUSALS[case]][-1])]


@pytest.mark.parametrize("case", TENSOR_REFUSALS)
def test_a_tensor_that_loading_refuses_is_an_error_by_its_key(tmp_path, model, bank, case):
    tensors, config, _ = TENSOR_REFUSALS[case]
    found = check_agreement(write_adapter(tmp_path / "adapter", tensors, **config), model, bank)
    assert any(key in tensors for f in found for key in keys(f))
    assert all(f.expected and f.found for f in found)


BROKEN_FILES = {
    "no_config": lambda folder: (folder / CONFIG).unlink(),
    "config_is_no_json": lambda folder: (folder / CONFIG).write_text("{"),
    "no_weights": lambda folder: (folder / WEIGHTS).unlink(),
    "weights_cut": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1]),
    "a_pickle": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "a_link_to_nothing": lambda folder: (folder / SIDECAR).symlink_to(folder / "gone"),
    "a_folder": lambda folder: (folder / SIDECAR).mkdir(),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path, model, bank, case):
    folder = write_adapter(tmp_path / "adapter", Q)
    BROKEN_FILES[case](folder)
    assert check_agreement(folder, model, bank)


def test_everything_that_is_wrong_is_found_at_once(tmp_path, model):
    tensors = {
        **Q,
        **pair("1.self_attn.q_proj", 17, 31),
        **pair("2.self_attn.q_proj", 16, 32, 3),
        **pair("9.self_attn.q_proj", 16, 32),
        **pair("0.self_attn.k_proj", 16, 8, dtype=np.float64),
        **pair("0.self_attn.z_proj", 16, 16),
        f"{PREFIX}0.self_attn.v_proj.lora_A.weight": np.ones((2, 16), np.float32),
        f"{PREFIX}0.self_attn.q_proj.lora_magnitude_vector": np.ones(32, np.float32),
    }
    config = {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1"],
        "use_dora": True,
        "bias": "all",
        "modules_to_save": ["lm_head", "score"],
        "rank_pattern": {"q_porj": 4},
    }
    folder = write_adapter(tmp_path / "adapter", tensors, **config)
    (folder / SIDECAR).write_text('{"version": 3}')
    found = validate(folder, model)
    short = {
        (f.severity, Path(f.file).name, key.removeprefix(PREFIX), f.found, f.expected) for f in found for key in keys(f)
    }
    assert {(severity, file, key) for severity, file, key, *_ in short} == {
        ("error", CONFIG, "use_dora"),
        ("error", CONFIG, "bias"),
        ("error", CONFIG, "modules_to_save"),
        ("error", CONFIG, "o_proj"),
        ("error", WEIGHTS, "1.self_attn.q_proj.lora_A.weight"),
        ("error", WEIGHTS, "1.self_attn.q_proj.lora_B.weight"),
        ("error", WEIGHTS, "2.self_attn.q_proj.lora_A.weight"),
        ("error", WEIGHTS, "9.self_attn.q_proj.lora_A.weight"),
        ("error", WEIGHTS, "0.self_attn.k_proj.lora_A.weight"),
        ("error", WEIGHTS, "0.self_attn.k_proj.lora_B.weight"),
        ("error", WEIGHTS, "0.self_attn.z_proj.lora_A.weight"),
        ("error", WEIGHTS, "0.self_attn.v_proj.lora_A.weight"),
        ("error", WEIGHTS, "0.self_attn.q_proj.lora_magnitude_vector"),
        ("error", SIDECAR, ""),
        ("warning", CONFIG, "rank_pattern.q_porj"),
        ("warning", CONFIG, "target_modules.o_proj"),
        ("warning", CONFIG, "target_modules.fc1"),
    }
    by_key = {key: (found, expected) for _, _, key, found, expected in short}
    assert by_key["1.self_attn.q_proj.lora_A.weight"] == ("[2, 17]", "[2, 16]")
    assert by_key["1.self_attn.q_proj.lora_B.weight"] == ("[31, 2]", "[32, 2]")
    assert by_key["2.self_attn.q_proj.lora_A.weight"] == ("rank 3", "rank 2")
    assert [f.severity for f in found] == sorted(f.severity for f in found), "errors come first"


def test_a_malformed_rank_hides_ranks_alone(tmp_path, model):
    tensors = {**Q, **pair("0.self_attn.z_proj", 16, 16)}
    found = validate(write_adapter(tmp_path / "adapter", tensors, r="2"), model)
    assert [f.key.removeprefix(PREFIX) for f in found] == ["r", "0.self_attn.z_proj.lora_A.weight"]


def test_without_a_model_the_adapter_is_checked_by_itself(tmp_path, model):
    (tmp_path / "config.json").write_text(json.dumps({**MODEL_CONFIG, "num_experts": "many"}))
    folder = write_adapter(tmp_path / "adapter", {**Q, "surprise": np.ones(1, np.float32)}, use_dora=True)
    found = validate(folder, tmp_path)
    assert [(Path(f.file).name, f.key) for f in found] == [
        ("config.json", "num_experts"),
        (CONFIG, "use_dora"),
        (WEIGHTS, "surprise"),
    ]
    assert [f.key for f in validate(folder, tmp_path / "gone")][1:] == [f.key for f in found][1:]
    assert [f.found for f in validate(tmp_path / "gone", model)] == ["no folder"]


def test_a_rank_is_held_against_the_banks_and_weights_against_its_dtype(tmp_path, model):
    folder = write_adapter(tmp_path / "adapter", {key: np.full_like(value, 1e6) for key, value in Q.items()})
    assert [f.found for f in validate(folder, model, max_rank=1)] == ["rank 2"]
    assert {f.severity for f in validate(folder, model, deep=True)} == {"warning"}
    (not_finite,) = errors(validate(folder, model, deep=True, dtype="float16"))
    assert not_finite.keys == (*Q,)
    with pytest.raises(InputError, match="int8"):
        validate(folder, model, dtype="int8")


def test_deep_warns_of_zeros_and_of_absurd_sizes(tmp_path, model):
    (key_a, a), (key_b, b) = Q.items()
    folder = write_adapter(tmp_path / "adapter", {key_a: 1000 * a, key_b: 0 * b})
    assert validate(folder, model) == []
    found = validate(folder, model, deep=True)
    assert {(f.severity, f.key, f.expected) for f in found} == {
        ("warning", key_a, "at most 10"),
        ("warning", key_b, "values other than zero"),
    }


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 5), st.floats(), st.text(max_size=4), st.just(10**400),
    st.lists(st.sampled_from(["q_proj", "gate_proj", GATE_UP, DOWN, "w1", 0, 1]), max_size=3),
    st.dictionaries(st.sampled_from(["q_proj", ".*", "(", "experts.gate_up_proj"]), st.integers(0, 4), max_size=2),
)  # fmt: skip
FIELDS = [
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters", "bias"),
    *(
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "peft_version",
        "use_dora",
        "new",
    ),
]
CHANGES = st.one_of(
    st.tuples(st.just("config"), st.sampled_from(FIELDS), VALUES),
    st.tuples(st.just("drop"), st.integers(0, 3), st.none()),
    st.tuples(
        st.just("rename"),
        st.integers(0, 3),
        st.sampled_from([("layers.0", "layers.1"), ("lora_A", "lora_B"), ("mlp", "xlp"), ("q_proj", "k_proj"),
                         ("experts", "experts.1"), (".base_layer", ""), ("w1", "w3"), ("weight", "bias")]),
    ),
    st.tuples(st.just("shape"), st.integers(0, 3), st.integers(0, 3)),
    st.tuples(st.just("dtype"), st.integers(0, 3), st.sampled_from(["f8", "i4", "f2"])),
    st.tuples(st.just("value"), st.integers(0, 3), st.sampled_from([np.nan, np.inf, 3.4e38, 0.0])),
    st.tuples(st.just("sidecar"), st.none(), st.sampled_from([SHARED_A, SHARED_B, {}, {"version": 1}, {"x": 1}, []])),
)  # fmt: skip


def change_tensors(tensors: dict[str, np.ndarray], kind: str, index: int, what: Any) -> None:
    """Changes one tensor in place of the dictionary."""
    if not tensors:
        return
    key = [*tensors][index % len(tensors)]
    value = tensors.pop(key)
    if kind == "rename":
        tensors[key.replace(*what)] = value
    elif kind == "shape":
        shapes = [value[..., :-1], value[:-1], value[None], value.T]
        tensors[key] = np.ascontiguousarray(shapes[what])
    elif kind == "dtype":
        tensors[key] = np.zeros(value.shape, what)
    elif kind == "value":
        tensors[key] = value.copy()
        if value.size and value.dtype.kind == "f":
            with np.errstate(over="ignore"):
                tensors[key].flat[0] = what


def check_random_changes(base: str, changes: list[tuple[str, Any, Any]], model: Path, bank: AdapterBank, at: Path):
    tensors, config, sidecar = GOOD[base]
    tensors, config = dict(tensors), dict(config)
    for kind, where, what in changes:
        if kind == "config":
            config[where] = what
        elif kind == "sidecar":
            sidecar = what
        else:
            change_tensors(tensors, kind, where, what)
    shutil.rmtree(at, ignore_errors=True)
    check_agreement(write(at, tensors, config, sidecar), model, bank)


AGREE = given(st.sampled_from([*GOOD]), st.lists(CHANGES, min_size=1, max_size=3))
UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@AGREE
@settings(max_examples=150, derandomize=True, **UNTIMED)
def test_validation_and_loading_agree_on_random_changes(model, bank, tmp_path, base, changes):
    check_random_changes(base, changes, model, bank, tmp_path / "adapter")


@pytest.mark.slow
@AGREE
@settings(max_examples=1000, derandomize=True, **UNTIMED)
def test_validation_and_loading_agree_on_many_random_changes(model, bank, tmp_path, base, changes):
    check_random_changes(base, changes, model, bank, tmp_path / "adapter")


def write_sparse(file: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A file of bfloat16 zeros that takes no disk; returns its size."""
    header, at = {}, 0
    for key, shape in shapes.items():
        end = at + 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + at)
    return file.stat().st_size


def test_two_gigabytes_of_weights_are_not_read(tmp_path, model, monkeypatch):
    """Per expert, where loading makes one array of all; every byte that is read goes through `TensorFile`."""
    wide = {**MODEL_CONFIG, "hidden_size": 8192, "moe_intermediate_size": 16384, "num_experts": 128}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    folder = write_adapter(tmp_path / "adapter", {}, r=64, target_modules=["gate_proj", "up_proj", "down_proj"])
    widths = {"gate": (8192, 16384), "up": (8192, 16384), "down": (16384, 8192)}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, expert, (module, (in_width, out_width)) in product((0, 2), range(128), widths.items()):
        path = f"{PREFIX}{layer}.mlp.experts.{expert}.{module}_proj"
        shapes |= {f"{path}.lora_A.weight": (64, in_width), f"{path}.lora_B.weight": (out_width, 64)}
    nbytes = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert write_sparse(folder / WEIGHTS, shapes) > 2e9
    sizes, read = [], TensorFile._read

    def counted(self: TensorFile, size: int, offset: int) -> bytes:
        sizes.append(size)
        return read(self, size, offset)

    monkeypatch.setattr(TensorFile, "_read", counted)
    monkeypatch.setattr(TensorFile, "_fill", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr(safetensors_io.np, "empty", lambda *_: pytest.fail("memory for weights was taken"))
    report = validate_folders(folder, tmp_path, False, max_rank=64, dtype="bfloat16")
    assert report.findings == []
    assert report.layout == "PEFT, per-expert matrices"
    assert report.bank_bytes == nbytes
    assert sum(sizes) == (folder / WEIGHTS).stat().st_size - nbytes, "the header, and not a byte more"


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["jax-moe-lora", "validate", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    written = capsys.readouterr()
    assert written.err == ""
    return exit.value.code or 0, written.out


DEMO = data_folder() / "model", data_folder() / "adapters" / "sort"


def test_the_command_is_silent_about_a_good_adapter_but_for_its_layout_and_size(monkeypatch, capsys):
    code, out = command(monkeypatch, capsys, str(DEMO[1]), "--model", str(DEMO[0]), "--deep")
    assert code == 0
    assert out.splitlines() == [
        f"{DEMO[1]} (PEFT, per-expert matrices, 624.0 KiB of a bfloat16 bank): 0 errors, 0 warnings"
    ]


def test_the_command_prints_each_finding_and_exits_with_1(monkeypatch, capsys, tmp_path, model):
    folder = write_adapter(tmp_path / "adapter", {**Q, "[red]": np.ones(1, np.float32)}, use_dora=True)
    code, out = command(monkeypatch, capsys, str(folder), "--model", str(model))
    assert code == 1
    *lines, last = out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["error", "error"]
    assert "use_dora is True: DoRA is not supported" in lines[0]
    assert "the key [red] is not understood" in lines[1]
    assert last.endswith("2 errors, 0 warnings")
    code, out = command(monkeypatch, capsys, str(folder), "--model", str(model), "--json")
    assert code == 1
    findings = [dataclasses.asdict(finding) for finding in validate(folder, model)]
    assert json.loads(out)["findings"] == json.loads(json.dumps(findings))


def test_a_bfloat16_file_is_validated_as_it_is_loaded(tmp_path, model, bank):
    folder = write_adapter(tmp_path / "adapter", {key: value.astype(ml_dtypes.bfloat16) for key, value in Q.items()})
    tensors = load_file(folder / WEIGHTS)
    assert check_agreement(folder, model, bank) == []
    key = next(iter(tensors))
    tensors[key].flat[0] = np.inf
    save_file(tensors, folder / WEIGHTS)
    assert [f.key for f in check_agreement(folder, model, bank)] == [key]
