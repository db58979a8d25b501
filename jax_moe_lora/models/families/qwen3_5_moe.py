"""Qwen3.5-MoE (and Qwen3.6), of which the text part is served."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_model, read_moe
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.qwen_hybrid import NO_EFFECT, PREDICTION, read_mixers, read_offset_norm, read_shared
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = (
    dict.fromkeys(QK_NORM, (True,))
    | dict.fromkeys(QKV_BIAS, (False,))
    | {"attn_output_gate": (True,), "output_gate_type": ("silu", "swish"), "norm_topk_prob": (True,)}
    | {"decoder_sparse_step": (1,), "language_model_only": (False, True)}
)
VISION: Mapping[str, str] = {r"model\.visual\..*": "the vision tower"}


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The text model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL, any_value=("intermediate_size", *NO_EFFECT))
    norm = read_offset_norm(fields)
    moe = read_moe(fields, "moe_intermediate_size", renormalize=True)
    mlp = RoutedMLP(moe, shared=read_shared(fields), shared_gate=True)
    layers = [LayerSpec(mixer, mlp, norm) for mixer in read_mixers(fields, norm, by_key_head=False)]
    return read_model(fields, generation, layers, model_type="qwen3_5_moe_text")


FAMILY = Family(
    "qwen3_5_moe_text",
    read_config,
    wrappers=("qwen3_5_moe",),
    prefixes=("model.language_model.",),
    unused={**PREDICTION, **VISION},
)
