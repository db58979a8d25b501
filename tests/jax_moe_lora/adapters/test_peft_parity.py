"""PEFT adapter folders that peft itself writes on a tiny Qwen3-MoE: read exactly as peft merges them.

torch, transformers and peft are imported by the functions that need them, so that collecting these tests is cheap.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.errors import AdapterFormatError
from support.models import ADAPTER_NAMES
from support.peft_files import CONFIG, DOWN, EXPERTS, GATE_UP, PREFIX, ROUTER, TINY, WEIGHTS, read, tiny_sites

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

    from jax_moe_lora.adapters.formats.config_reading import USED
    from jax_moe_lora.adapters.formats.neutral_fields import NEUTRAL_NAMES, REFUSED

    sorted_out = USED | NEUTRAL_NAMES | set(REFUSED)
    refused_as_unknown = {
        *("megatron_config", "loftq_config", "corda_config", "lora_ga_config", "velora_config"),
        *("monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
    }
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= sorted_out | refused_as_unknown
