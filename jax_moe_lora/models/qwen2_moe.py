"""Qwen2-MoE: its `config.json`, and the names that its projections have in files."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.models.decoder_config import open_fields, read_decoder, read_moe, read_sparse_layers
from jax_moe_lora.models.names import ATTENTION, DENSE_MLP, EXPERTS, ROUTER, SHARED_EXPERT

MODEL_TYPE = "qwen2_moe"
ADAPTER_NAMES = AdapterNames(
    dense=ATTENTION | ROUTER | DENSE_MLP | SHARED_EXPERT, experts=EXPERTS, experts_path="mlp.experts"
)


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, harmless=("max_window_layers", "sliding_window"))
    fields.expect("use_sliding_window", (None, False), "sliding-window attention is not supported")
    return read_decoder(
        fields,
        generation,
        model_type=MODEL_TYPE,
        moe=read_moe(fields, "moe_intermediate_size", fields.flag("norm_topk_prob", False)),
        moe_layers=read_sparse_layers(fields),
        mlp_width=fields.size("intermediate_size"),
        shared_expert_width=fields.size("shared_expert_intermediate_size"),
        qk_norm=None,
        attention_biases="qkv" if fields.flag("qkv_bias", True) else "",  # early configs have no such field
        default_eps=1e-6,
    )
