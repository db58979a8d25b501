"""PEFT adapter folders: read exactly as peft merges them, or refused by name; nothing in between.

Real files are written by peft on a tiny Qwen3-MoE; torch, transformers and peft are imported inside the functions
that need them, so the hand-built files of the refusals need none of them.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from jax_moe_lora.errors import AdapterFormatError, CheckpointError
from jax_moe_lora.files.safetensors_io import open_tensors, read_json, tensor_infos
from jax_moe_lora.models.families.qwen3_moe import ADAPTER_NAMES

PREFIX = "base_model.model.model.layers."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
# Layer 1 is dense. No two widths that a reader could confuse are equal: 2F = 24 is not H = 16.
TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
}
DENSE_PATHS = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate": "router",
    "mlp.gate_proj": "mlp_gate",
    "mlp.up_proj": "mlp_up",
    "mlp.down_proj": "mlp_down",
}


def tiny_sites(**overrides: Any) -> dict[str, Site]:
    """The sites of `tiny_qwen3_moe`, written out from the config."""
    c = {**TINY, **overrides}
    every = tuple(range(c["num_hidden_layers"]))
    dense = tuple(layer for layer in every if layer in c["mlp_only_layers"])
    routed = tuple(layer for layer in every if layer not in dense)
    h, f, i, e = c["hidden_size"], c["moe_intermediate_size"], c["intermediate_size"], c["num_experts"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    widths = {"q": (h, q), "k": (h, kv), "v": (h, kv), "o": (q, h)}
    sites = {module: Site(*width, 1, every) for module, width in widths.items()}
    sites |= {"gate": Site(h, f, e, routed), "up": Site(h, f, e, routed), "down": Site(f, h, e, routed)}
    sites |= {"mlp_gate": Site(h, i, 1, dense), "mlp_up": Site(h, i, 1, dense), "mlp_down": Site(i, h, 1, dense)}
    return sites | {"router": Site(h, e, 1, routed)}


def tiny_qwen3_moe(**overrides: Any) -> Any:
    """A random three-layer `Qwen3MoeForCausalLM` in float32; the same weights at every call."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**TINY, **overrides})).eval()


def save_random_adapter(model: Any, folder: Path, seed: int = 0, **config: Any) -> Path:
    """Wraps `model` (in place) by peft, fills every A and B with random values, and saves the adapter.

    Args:
      config: fields of `peft.LoraConfig`. peft starts B at zero, hence the filling.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's notes on target_parameters and on unmatched targets
        wrapped = get_peft_model(model, LoraConfig(**config), autocast_adapter_dtype=False)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter))
        wrapped.save_pretrained(str(folder))
    return folder


def peft_deltas(folder: Path, **overrides: Any) -> dict[tuple[int, str], np.ndarray]:
    """(layer, module) -> float32 `[E, out, in]`: what peft itself makes of a folder.

    peft loads the files into a model whose weights are all zero and merges: the weights are then the update, free of
    rounding against a base.
    """
    import torch
    from peft import PeftModel

    model = tiny_qwen3_moe(**overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    deltas: dict[tuple[int, str], np.ndarray] = {}
    for name, parameter in merged.named_parameters():
        value = parameter.detach().numpy()
        if not value.any():
            continue
        _, _, layer, path = name.split(".", 3)
        if path == GATE_UP:
            half = value.shape[1] // 2
            deltas[int(layer), "gate"], deltas[int(layer), "up"] = value[:, :half], value[:, half:]
        elif path == DOWN:
            deltas[int(layer), "down"] = value
        else:
            deltas[int(layer), DENSE_PATHS[path.removesuffix(".weight")]] = value[None]
    return deltas


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    """A folder as peft 0.21.2 would write it, with these tensors and config fields; a field of `...` is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "peft_version": "0.21.2", "r": 2, "lora_alpha": 4, "bias": "none"}
    fields |= {"target_modules": ["q_proj"], "target_parameters": None} | config
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))
    save_file(dict(tensors), folder / WEIGHTS)
    return folder


def pair(path: str, in_width: int, out_width: int, rank: int = 2, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A and B of one module, `path` below `model.layers.`, with values that depend on the path."""
    random = np.random.default_rng(list(path.encode()))
    return {
        f"{PREFIX}{path}.lora_A.weight": random.standard_normal((rank, in_width)).astype(dtype),
        f"{PREFIX}{path}.lora_B.weight": random.standard_normal((out_width, rank)).astype(dtype),
    }


def split_to_per_expert(folder_in: Path, folder_out: Path, num_experts: int = TINY["num_experts"]) -> Path:
    """Rewrites 3-D expert adapters as 2-D ones per expert, exactly: what transformers 4 and peft wrote.

    Args:
      folder_in: an adapter of both expert parameters.
    """
    config = json.loads((folder_in / CONFIG).read_text())
    tensors: dict[str, np.ndarray] = {}
    for key, a in load_file(folder_in / WEIGHTS).items():
        if "lora_A" not in key or ".mlp.experts." not in key:
            continue
        layer = key.removeprefix(PREFIX).split(".")[0]
        b = load_file(folder_in / WEIGHTS)[key.replace("lora_A", "lora_B")]
        rank, half = a.shape[0] // num_experts, b.shape[0] // 2
        rows = {"gate": slice(0, half), "up": slice(half, None)} if ".base_layer." in key else {"down": slice(None)}
        for expert in range(num_experts):
            own_a = a[expert * rank : (expert + 1) * rank]
            own_b = np.stack([b[:, index * num_experts + expert] for index in range(rank)], axis=1)
            for module, part in rows.items():
                path = f"{layer}.mlp.experts.{expert}.{module}_proj"
                tensors[f"{PREFIX}{path}.lora_A.weight"] = np.ascontiguousarray(own_a)
                tensors[f"{PREFIX}{path}.lora_B.weight"] = np.ascontiguousarray(own_b[part])
    config |= {"target_modules": ["gate_proj", "up_proj", "down_proj"], "target_parameters": None}
    folder_out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder_out / WEIGHTS)
    (folder_out / CONFIG).write_text(json.dumps(config))
    return folder_out


def copy_with(folder_in: Path, folder_out: Path, **config: Any) -> Path:
    """A copy of an adapter folder with some config fields changed."""
    shutil.copytree(folder_in, folder_out)
    fields = json.loads((folder_out / CONFIG).read_text())
    (folder_out / CONFIG).write_text(json.dumps(fields | config))
    return folder_out


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = {"target_modules": [], "target_parameters": [GATE_UP, DOWN]}
PLAIN = {"r": 4, "lora_alpha": 8}
CASES = {
    "both_expert_parameters": {**PLAIN, **EXPERTS},
    "gate_up_alone": {**PLAIN, "target_modules": [], "target_parameters": [GATE_UP]},
    "down_alone": {**PLAIN, "target_modules": [], "target_parameters": [DOWN]},
    "router_alone": {**PLAIN, "target_modules": [], "target_parameters": [ROUTER]},
    "router_as_module": {**PLAIN, "target_modules": ["gate"]},
    "attention_router_experts": {
        **PLAIN,
        "target_modules": ATTENTION,
        "target_parameters": [GATE_UP, DOWN, ROUTER],
    },
    "all_linear": {**PLAIN, "target_modules": "all-linear"},
    "names_of_transformers_4": {**PLAIN, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "dense_mlp_as_parameters": {
        **PLAIN,
        "target_modules": [],
        "target_parameters": ["mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"],
    },
    "rank_stabilised": {
        **PLAIN,
        "use_rslora": True,
        "target_modules": ["q_proj"],
        "target_parameters": [GATE_UP, DOWN],
    },
    "patterns": {
        **PLAIN,
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": [GATE_UP, DOWN, ROUTER],
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.experts\.down_proj": 3, "gate_up_proj": 5, "gate": 7},
        "alpha_pattern": {"v_proj": 3, r".*\.layers\.2\..*gate_up_proj": 7, ROUTER: 5, "proj": 100},
    },
    "some_layers": {**PLAIN, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 2]},
    "one_layer_by_pattern": {
        **PLAIN,
        "target_modules": ["q_proj"],
        "layers_to_transform": 1,
        "layers_pattern": "layers",
    },
    "regex": {**PLAIN, "target_modules": r".*self_attn\.(q|v)_proj", "target_parameters": [DOWN]},
    "excluded": {**PLAIN, "target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
}


def read(folder: Path) -> LoRAAdapter:
    return read_adapter(folder, tiny_sites(), ADAPTER_NAMES)


def assert_same_deltas(adapter: LoRAAdapter, expected: dict[tuple[int, str], np.ndarray], tolerance: float = 1e-6):
    assert set(adapter.weights) == set(expected)
    for key, delta in expected.items():
        for expert in range(len(delta)):
            found = adapter.weights[key].delta(expert)
            relative = np.linalg.norm(found - delta[expert]) / np.linalg.norm(delta[expert])
            assert relative <= tolerance, f"{key} expert {expert}: relative Frobenius error {relative:.2e}"


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "adapter"
    return save_random_adapter(tiny_qwen3_moe(), folder, **CASES[request.param])


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "adapter"
    return save_random_adapter(tiny_qwen3_moe(), folder, **CASES["both_expert_parameters"])


@pytest.mark.parity
def test_every_delta_equals_what_peft_merges(written):
    assert_same_deltas(read(written), peft_deltas(written))


@pytest.mark.parity
def test_gate_and_up_of_a_fused_parameter_hold_one_a(experts):
    adapter = read(experts)
    for layer in (0, 2):
        assert adapter.weights[layer, "gate"].a is adapter.weights[layer, "up"].a
    assert adapter.name == "adapter"
    assert read_adapter(experts, tiny_sites(), ADAPTER_NAMES, "mine").name == "mine"


@pytest.mark.parity
def test_a_bfloat16_file_stays_bfloat16(tmp_path):
    import torch

    folder = save_random_adapter(tiny_qwen3_moe().to(torch.bfloat16), tmp_path / "adapter", **CASES["patterns"])
    adapter = read(folder)
    assert {w.a.dtype for w in adapter.weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert {w.b.dtype for w in adapter.weights.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert_same_deltas(adapter, peft_deltas(folder))


@pytest.mark.parity
def test_per_expert_modules_equal_the_fused_parameter_that_they_were_split_from(experts, tmp_path):
    assert_same_deltas(read(split_to_per_expert(experts, tmp_path / "split")), peft_deltas(experts))


@pytest.mark.parity
def test_a_rank_that_disagrees_with_the_config_is_refused_in_a_real_file(experts, tmp_path):
    folder = copy_with(experts, tmp_path / "adapter", r=2)
    with pytest.raises(AdapterFormatError, match=r"layers\.0\.mlp\.experts.*rank 4.*says 2") as caught:
        read(folder)
    assert WEIGHTS in str(caught.value)


@pytest.mark.parity
def test_every_field_of_pefts_config_is_used_harmless_or_refused():
    import dataclasses

    from peft import LoraConfig

    from jax_moe_lora.adapters.formats import peft_config

    sorted_out = peft_config._USED | peft_config._HARMLESS | set(peft_config._REFUSED)
    refused_as_unknown = {
        *("megatron_config", "loftq_config", "corda_config", "lora_ga_config", "velora_config"),
        *("monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
    }
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= sorted_out | refused_as_unknown


Q = pair("0.self_attn.q_proj", 16, 32)
Q_A, Q_B = f"{PREFIX}0.self_attn.q_proj.lora_A.weight", f"{PREFIX}0.self_attn.q_proj.lora_B.weight"


def fused(inner: bool, in_width: int, out_width: int, rank: int = 2, layer: int = 0) -> dict[str, np.ndarray]:
    """A and B of a 3-D expert parameter in layer 0."""
    return pair(f"{layer}.mlp.experts{'.base_layer' if inner else ''}", in_width, out_width, rank * TINY["num_experts"])


BOTH = {**fused(True, 16, 24), **fused(False, 12, 16)}
ONE_GATE = pair("0.mlp.experts.1.gate_proj", 16, 12)


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


CONFIG_REFUSALS = {
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "lora_bias": {"lora_bias": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "token_indices": {"trainable_token_indices": [1]},
    "replication": {"layer_replication": [[0, 2]]},
    "alora": {"alora_invocation_tokens": [1]},
    "qalora": {"use_qalora": True},
    "arrow": {"arrow_config": {"top_k": 1}},
    "bdlora": {"use_bdlora": {"nblocks": 2}},
    "kasa": {"kasa_config": {"beta": 1}},
    "velora": {"velora_config": {"rank": 1}},
    "monteclora": {"monteclora_config": {"n": 1}},
    "lora_ga": {"lora_ga_config": {"steps": 1}},
    "corda": {"corda_config": {"method": "kpm"}},
    "loftq": {"loftq_config": {"loftq_bits": 4}},
    "megatron": {"megatron_config": {"x": 1}},
    "unknown_field": {"from_the_future": True},
    "peft_type": {"peft_type": "LOHA"},
    "bias": {"bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
    "no_rank": {"r": ...},
    "zero_rank": {"r": 0},
    "huge_rank": {"r": 10**400},
    "rank_pattern": {"rank_pattern": {"q_proj": 0}},
    "rank_pattern_list": {"rank_pattern": [1]},
    "rank_pattern_regex": {"rank_pattern": {"(": 2}},
    "alpha_text": {"lora_alpha": "4"},
    "alpha_nan": {"lora_alpha": float("nan")},
    "alpha_huge_integer": {"lora_alpha": 10**400},
    "alpha_past_float32": {"lora_alpha": 1e300},
    "alpha_pattern": {"alpha_pattern": {"q_proj": None}},
    "rslora_text": {"use_rslora": "false"},
    "targets_number": {"target_modules": 3},
    "targets_regex": {"target_modules": "("},
    "parameters_text": {"target_parameters": "mlp.gate.weight"},
    "layers": {"layers_to_transform": ["0"]},
    "layers_pattern": {"layers_to_transform": [0], "layers_pattern": ["("]},
}


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


TENSOR_REFUSALS = {
    "dora_key": ({**Q, f"{PREFIX}0.self_attn.q_proj.lora_magnitude_vector": np.ones(32, np.float32)}, {}, "DoRA"),
    "embedding": (
        {**Q, "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((2, 32), np.float32)},
        {},
        "embed",
    ),
    "head": ({**Q, "base_model.model.lm_head.lora_A.weight": np.ones((2, 16), np.float32)}, {}, "head"),
    "bias_key": ({**Q, f"{PREFIX}0.self_attn.q_proj.lora_B.bias": np.ones(32, np.float32)}, {}, "bias"),
    "unknown_key": ({**Q, "surprise": np.ones(1, np.float32)}, {}, "surprise"),
    "unknown_module": ({**Q, **pair("0.self_attn.z_proj", 16, 16)}, {}, r"z_proj\.lora_A"),
    "layer_past_the_end": (pair("3.self_attn.q_proj", 16, 32), {}, r"layers\.3.*layer 3"),
    "router_of_a_dense_layer": (pair("1.mlp.gate", 16, 3), {"target_modules": ["gate"]}, r"layers\.1\.mlp\.gate"),
    "expert_past_the_end": (
        pair("0.mlp.experts.3.up_proj", 16, 12),
        {"target_modules": ["up_proj"]},
        r"experts\.3.*0 to 2",
    ),
    "a_alone": ({Q_A: Q[Q_A]}, {}, r"q_proj\.lora_A\.weight.*without its lora_B"),
    "b_alone": ({Q_B: Q[Q_B]}, {}, r"q_proj\.lora_B\.weight.*without its lora_A"),
    "layer_spelled_twice": ({**Q, **pair("00.self_attn.q_proj", 16, 32)}, {}, r"layers\.00\."),
    "layer_in_other_digits": (pair("٠.self_attn.q_proj", 16, 32), {}, "٠"),
    "expert_spelled_twice": (
        {**ONE_GATE, **pair("0.mlp.experts.01.gate_proj", 16, 12)},
        {"target_modules": ["gate_proj"]},
        r"experts\.01\.",
    ),
    "dtype": ({k: v.astype(np.float64) for k, v in Q.items()}, {}, r"q_proj\.lora_A.*F64"),
    "three_dimensions": ({k: v[None] for k, v in Q.items()}, {}, r"q_proj\.lora_A.*two dimensions"),
    "rank": (pair("0.self_attn.q_proj", 16, 32, 3), {}, r"q_proj\.lora_A.*rank 3.*says 2"),
    "rank_of_b": ({Q_A: Q[Q_A], Q_B: np.ones((32, 3), np.float32)}, {}, r"q_proj\.lora_B.*\[32, 3\].*\[32, 2\]"),
    "width": (pair("0.self_attn.q_proj", 17, 32), {}, r"q_proj\.lora_A.*\[2, 17\].*\[2, 16\]"),
    "not_targeted": (Q, {"target_modules": ["k_proj"]}, r"q_proj\.lora_A.*does not target"),
    "excluded": (Q, {"exclude_modules": ["q_proj"]}, r"q_proj\.lora_A.*does not target"),
    "other_layer": (Q, {"layers_to_transform": [1]}, r"q_proj\.lora_A.*does not target"),
    "not_a_multiple_of_experts": (
        pair("0.mlp.experts", 12, 16, 7),
        {"target_modules": [], "target_parameters": [DOWN]},
        r"experts\.lora_A.*7 rows.*3 experts",
    ),
    "inner_without_outer": (fused(True, 16, 24), EXPERTS, r"base_layer\.lora_A.*without its outer"),
    "outer_alone_undecided": (fused(False, 12, 16), EXPERTS, r"experts\.lora_A.*both gate_up_proj and down_proj"),
    "outer_alone_not_targeted": (fused(False, 12, 16), {}, r"experts\.lora_A.*neither"),
    "exchanged_wrappers": ({**fused(True, 12, 16), **fused(False, 16, 24)}, EXPERTS, r"experts.*lora_A"),
    "fused_and_per_expert": (
        {**BOTH, **ONE_GATE},
        {"target_modules": ["gate_proj"], "target_parameters": [GATE_UP, DOWN]},
        r"experts.*lora_A.*3-D.*per-expert",
    ),
    "two_orientations": ({**fused(True, 24, 16), **fused(False, 12, 16)}, EXPERTS, r"base_layer.*transposed.*0\.19\.0"),
}


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


BAD_JSON = {
    "not_json": (b"{", "not valid JSON"),
    "not_utf8": (b'{"r": "\xff"}', "not valid JSON"),
    "not_an_object": (b"[]", "expected an object"),
    "key_twice": (b'{"r": 1, "r": 2}', "'r' twice"),
    "endless_number": (b'{"r": ' + b"1" * 5000 + b"}", "not valid JSON"),
    "deep": (b"[" * 200_000, "not valid JSON"),
    "oversized": (b" " * (16 * 2**20 + 1), "bytes"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_a_bad_json_file_is_an_error_that_names_it(tmp_path, case):
    content, pattern = BAD_JSON[case]
    file = tmp_path / CONFIG
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=pattern) as caught:
        read_json(file, CheckpointError)
    assert str(file) in str(caught.value)


def header(shape: list[int], end: int, dtype: str = "F32") -> bytes:
    text = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()
    return len(text).to_bytes(8, "little") + text


BAD_TENSORS = {
    "empty": b"",
    "absurd_header_size": (2**63).to_bytes(8, "little") + b"{}",
    "header_past_the_end": (2**20).to_bytes(8, "little") + b"{}",
    "header_is_no_json": (4).to_bytes(8, "little") + b"oops",
    "truncated": header([4], 16) + b"1234",
    "shape_past_the_offsets": header([2**40, 2**40], 4) + b"1234",
    "unknown_dtype": header([4], 4, "Q7") + b"1234",
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_bad_safetensors_file_is_an_error_that_names_it(tmp_path, case):
    file = tmp_path / WEIGHTS
    file.write_bytes(BAD_TENSORS[case])
    with pytest.raises(CheckpointError) as caught:
        tensor_infos(file, CheckpointError)
    assert str(file) in str(caught.value)


def test_a_folder_or_nothing_is_no_safetensors_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=str(path)):
            tensor_infos(path, CheckpointError)


def test_fp8_is_described_and_refused_when_it_is_read(tmp_path):
    file = tmp_path / WEIGHTS
    file.write_bytes(header([4], 4, "F8_E4M3") + b"1234")
    assert tensor_infos(file, CheckpointError)["x"].dtype == "F8_E4M3"
    with pytest.raises(CheckpointError, match=str(file)), open_tensors(file, CheckpointError) as tensors:
        tensors.get_tensor("x")
