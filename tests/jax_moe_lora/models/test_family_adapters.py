"""Adapter keys by family: those of its projections are read, those of another family's are refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.sites import adapter_sites
from support.models import decoder_config

D, F, SHARED, E, R = 16, 12, 10, 3, 2
# Path in layer 0 -> its module, and its widths.
READ = {
    "mixtral": {
        "block_sparse_moe.gate": ("router", D, E),
        "block_sparse_moe.experts.1.w1": ("gate", D, F),
        "block_sparse_moe.experts.2.w2": ("down", F, D),
        "block_sparse_moe.experts.0.w3": ("up", D, F),
    },
    "olmoe": {"mlp.gate": ("router", D, E), "mlp.experts.1.down_proj": ("down", F, D)},
    "qwen2_moe": {
        "mlp.gate": ("router", D, E),
        "mlp.experts.1.gate_proj": ("gate", D, F),
        "mlp.shared_expert.gate_proj": ("shared_gate", D, SHARED),
        "mlp.shared_expert.up_proj": ("shared_up", D, SHARED),
        "mlp.shared_expert.down_proj": ("shared_down", SHARED, D),
        "mlp.shared_expert_gate": ("shared_expert_gate", D, 1),
    },
}
REFUSED = {
    "mixtral": {"mlp.up_proj": (D, F), "mlp.shared_expert.up_proj": (D, SHARED), "mlp.router": (D, E)},
    "olmoe": {
        "mlp.gate_proj": (D, F),
        "mlp.shared_expert.up_proj": (D, SHARED),
        "mlp.shared_expert_gate": (D, 1),
        "block_sparse_moe.gate": (D, E),
    },
    "qwen2_moe": {"mlp.up_proj": (D, F), "mlp.shared_expert.3.up_proj": (D, F), "mlp.shared_experts.up_proj": (D, F)},
}


def write(folder: Path, paths: dict[str, tuple[int, int]]) -> Path:
    """A PEFT folder of rank R that targets each of these paths of layer 0."""
    tensors = {}
    for path, (in_width, out_width) in paths.items():
        key = f"base_model.model.model.layers.0.{path}"
        tensors[f"{key}.lora_A.weight"] = np.full((R, in_width), len(path), np.float32)
        tensors[f"{key}.lora_B.weight"] = np.ones((out_width, R), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 4, "target_modules": list(paths)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def load(model_type: str, folder: Path) -> LoRAAdapter:
    shared = SHARED if model_type == "qwen2_moe" else 0
    config = decoder_config(model_type, 32, D, (4, 4, 4), MoEConfig(D, F, E, 2), shared_width=shared)
    return read_adapter(folder, adapter_sites(config), adapter_names(config))


@pytest.mark.parametrize("model_type", READ)
def test_every_projection_of_the_family_is_read(tmp_path: Path, model_type: str) -> None:
    paths = {path: (in_width, out_width) for path, (_, in_width, out_width) in READ[model_type].items()}
    weights = load(model_type, write(tmp_path, paths)).weights
    assert set(weights) == {(0, module) for module, _, _ in READ[model_type].values()}
    for path, (module, _, _) in READ[model_type].items():
        assert weights[0, module].a.max() == len(path)


@pytest.mark.parametrize(
    ("model_type", "path"), [(model_type, path) for model_type, paths in REFUSED.items() for path in paths]
)
def test_another_familys_projection_is_refused_by_its_key(tmp_path: Path, model_type: str, path: str) -> None:
    with pytest.raises(AdapterFormatError, match=rf"layers\.0\.{path}\.lora_A.*the model has no"):
        load(model_type, write(tmp_path, {path: REFUSED[model_type][path]}))


def test_one_projection_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {"block_sparse_moe.gate": (D, E), "mlp.gate": (D, E)})
    with pytest.raises(AdapterFormatError, match=r"mlp\.gate\.lora_A\.weight.*router.*another"):
        load("mixtral", folder)
