"""Tiny Qwen3-MoE checkpoints, written from the format without the code under test."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.params import ModelParams

TINY: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "hidden_act": "silu",
    "max_position_embeddings": 64,
}

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def expected_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint without biases and with its own head, written out from the format."""
    d, hd = raw["hidden_size"], raw["head_dim"]
    queries, keys = raw["num_attention_heads"] * hd, raw["num_key_value_heads"] * hd
    shapes = {f"{n}.weight": (raw["vocab_size"], d) for n in ("model.embed_tokens", "lm_head")} | {
        "model.norm.weight": (d,)
    }
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{norm}_layernorm.weight": (d,) for norm in ("input", "post_attention")}
        shapes |= {
            f"{at}.self_attn.{m}_proj.weight": s
            for m, s in zip("qkvo", ((queries, d), (keys, d), (keys, d), (d, queries)), strict=True)
        }
        shapes |= {f"{at}.self_attn.{m}_norm.weight": (hd,) for m in "qk"}
        dense = layer in raw["mlp_only_layers"]
        width = raw["intermediate_size"] if dense else raw["moe_intermediate_size"]
        if not dense:
            shapes[f"{at}.mlp.gate.weight"] = (raw["num_experts"], d)
        for mlp in [f"{at}.mlp"] if dense else [f"{at}.mlp.experts.{e}" for e in range(raw["num_experts"])]:
            shapes |= {f"{mlp}.{m}_proj.weight": (width, d) for m in ("gate", "up")} | {
                f"{mlp}.down_proj.weight": (d, width)
            }
    return shapes


def write(folder: Path, dtype: Any = np.float32, **changes: Any) -> dict[str, np.ndarray]:
    """A checkpoint in two shards, written without the code under test; returns its tensors."""
    raw = {**TINY, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    random = np.random.default_rng(0)
    tensors = {n: random.standard_normal(s).astype(dtype) for n, s in expected_shapes(raw).items()}
    names = list(tensors)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for shard, half in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in half}, folder / shard)
    weight_map = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


def load(folder: Path, dtype: Any = "float32", sharding: jax.sharding.Sharding | None = None) -> ModelParams:
    return load_params(folder, read_model_config(folder), dtype, sharding)


def edit_index(folder: Path, **changes: str) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= changes
    file.write_text(json.dumps(index))
