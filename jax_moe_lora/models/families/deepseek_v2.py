"""DeepSeek-V2, V2.5 and V2-Lite."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_model, read_norm
from jax_moe_lora.models.families import deepseek
from jax_moe_lora.models.families.deepseek import layer_specs, read_mla
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.routed_experts import read_experts, read_first_dense, read_groups, read_routed
from jax_moe_lora.models.neutral_fields import Values
from jax_moe_lora.models.specs.model import ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = {
    **deepseek.NEUTRAL,
    "norm_topk_prob": (False,),
    "rope_interleave": (True,),
    "scoring_func": ("softmax",),
}


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL)
    norm, attention = read_norm(fields, 1e-6), read_mla(fields, interleaved=True)
    fields.expect("head_dim", (None, attention.rope_dim), "it is another name of qk_rope_head_dim")
    method = fields.get("topk_method", "greedy")
    fields.expect("topk_method", (None, "greedy", "group_limited_greedy"), "the class knows no other choice")
    groups = read_groups(fields, (1, 1))
    moe = read_experts(
        fields,
        renormalize=False,
        scaling=fields.positive("routed_scaling_factor", 1.0),
        **(groups if method == "group_limited_greedy" else {}),
    )
    layers = layer_specs(fields, attention, read_routed(fields, moe), norm, read_first_dense(fields, 0))
    return read_model(fields, generation, layers, model_type="deepseek_v2")


FAMILY = Family("deepseek_v2", read_config)
