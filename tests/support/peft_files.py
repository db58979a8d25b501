"""Adapter folders as peft writes them, built by hand for a tiny Qwen3-MoE; torch and peft are not needed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jax_moe_lora.adapters.formats.detect import read_adapter
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from support.models import ADAPTER_NAMES

PREFIX = "base_model.model.model.layers."

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"

EXPERTS = {"target_modules": [], "target_parameters": [GATE_UP, DOWN]}

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


def read(folder: Path) -> LoRAAdapter:
    return read_adapter(folder, tiny_sites(), ADAPTER_NAMES)


Q = pair("0.self_attn.q_proj", 16, 32)

Q_A, Q_B = f"{PREFIX}0.self_attn.q_proj.lora_A.weight", f"{PREFIX}0.self_attn.q_proj.lora_B.weight"


def fused(inner: bool, in_width: int, out_width: int, rank: int = 2, layer: int = 0) -> dict[str, np.ndarray]:
    """A and B of a 3-D expert parameter in layer 0."""
    return pair(f"{layer}.mlp.experts{'.base_layer' if inner else ''}", in_width, out_width, rank * TINY["num_experts"])


BOTH = {**fused(True, 16, 24), **fused(False, 12, 16)}

ONE_GATE = pair("0.mlp.experts.1.gate_proj", 16, 12)
