"""Qwen3-Next."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import read_activation, read_model, read_moe, read_sparse_layers
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.qwen import open_qwen
from jax_moe_lora.models.families.qwen_hybrid import NO_EFFECT, PREDICTION, read_mixers, read_offset_norm, read_shared
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = dict.fromkeys(QK_NORM, (True,)) | dict.fromkeys(QKV_BIAS, (False,)) | {"attn_output_gate": (True,)}


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_qwen(raw, source, NEUTRAL, NO_EFFECT)
    norm = read_offset_norm(fields)
    mixers, is_routed = read_mixers(fields, norm, by_key_head=True), read_sparse_layers(fields)
    moe = read_moe(fields, "moe_intermediate_size", fields.flag("norm_topk_prob", True))
    routed = RoutedMLP(moe, shared=read_shared(fields), shared_gate=True)
    width = fields.get("intermediate_size") if all(is_routed) else fields.size("intermediate_size")
    mlps = [routed if here else DenseMLP(width, read_activation(fields)) for here in is_routed]
    layers = [LayerSpec(mixer, mlp, norm) for mixer, mlp in zip(mixers, mlps, strict=True)]
    return read_model(fields, generation, layers, model_type="qwen3_next")


FAMILY = Family("qwen3_next", read_config, unused=PREDICTION)
