"""GLM-4.7-Flash: DeepSeek-V3's layers, which of them are routed said one by one."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_layers, read_model, read_norm
from jax_moe_lora.models.families import deepseek
from jax_moe_lora.models.families.deepseek import layer_specs, read_mla
from jax_moe_lora.models.families.deepseek_v3 import ROUTER
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.routed_experts import read_experts, read_groups, read_routed
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.specs.model import ModelConfig


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, {**deepseek.NEUTRAL, **ROUTER}, deepseek.ANY_VALUE)
    norm, attention = read_norm(fields, 1e-5), read_mla(fields)
    fields.expect("head_dim", (None, attention.rope_dim), "it is another name of qk_rope_head_dim")
    moe = read_experts(
        fields,
        fields.flag("norm_topk_prob", True),
        router="sigmoid_bias",
        scaling=fields.positive("routed_scaling_factor", 1.8),
        group_score="top2_sum",
        **read_groups(fields, (1, 1)),
    )
    layers = layer_specs(fields, attention, read_routed(fields, moe, choice_bias=True), norm, _routed_layers(fields))
    return read_model(fields, generation, layers, model_type="glm4_moe_lite")


def _routed_layers(fields: Fields) -> Sequence[bool]:
    """By `mlp_layer_types`; a config without has one dense layer, and `first_k_dense_replace` must agree."""
    count = read_layers(fields)
    types = fields.get("mlp_layer_types", ["dense"] + ["sparse"] * (count - 1))
    if not isinstance(types, list) or len(types) != count or not {*types} <= {"dense", "sparse"}:
        expected = f"a list of 'dense' and 'sparse' for {count} layers was expected"
        raise fields.error(f"mlp_layer_types is {types!r}, {expected}", "mlp_layer_types")
    is_routed = [kind == "sparse" for kind in types]
    if not any(is_routed):
        raise fields.error("mlp_layer_types has no 'sparse' layer, one at least was expected", "mlp_layer_types")
    first = is_routed.index(True)
    fields.expect("first_k_dense_replace", (None, first), f"the class has {first} dense layers by mlp_layer_types")
    return is_routed


FAMILY = Family("glm4_moe_lite", read_config, prediction_layers=True)
