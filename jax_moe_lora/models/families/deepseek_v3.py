"""DeepSeek-V3, R1 and V3.1, and Moonlight, which has their model type."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_model, read_norm
from jax_moe_lora.models.families.deepseek import ANY_VALUE, NEUTRAL, layer_specs, read_mla
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.routed_experts import read_experts, read_first_dense, read_groups, read_routed
from jax_moe_lora.models.neutral_fields import Values
from jax_moe_lora.models.specs.model import ModelConfig

# The class always scores by sigmoid, with a bias for the choice.
ROUTER: Values = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}


def read_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str, model_type: str = "deepseek_v3"
) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Args:
      raw: its fields.
      generation: `generation_config.json`, or None.
      source: what errors call the file.
      model_type: the family's name, for those that are this one under another.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, {**NEUTRAL, **ROUTER}, ANY_VALUE)
    norm, attention = read_norm(fields, 1e-6), read_mla(fields)
    fields.expect("head_dim", (None, attention.rope_dim), "it is another name of qk_rope_head_dim")
    moe = read_experts(
        fields,
        fields.flag("norm_topk_prob", True),
        router="sigmoid_bias",
        scaling=fields.positive("routed_scaling_factor", 2.5),
        group_score="top2_sum",
        **read_groups(fields, (8, 4)),
    )
    routed = read_routed(fields, moe, choice_bias=True)
    layers = layer_specs(fields, attention, routed, norm, read_first_dense(fields, 3))
    return read_model(fields, generation, layers, model_type=model_type)


def family_like(model_type: str, **others: Any) -> Family:
    """A family whose configs are those of DeepSeek-V3.

    Args:
      model_type: its name.
      others: further fields of `Family`.
    """
    return Family(model_type, partial(read_config, model_type=model_type), **others)


FAMILY = family_like("deepseek_v3", prediction_layers=True)
