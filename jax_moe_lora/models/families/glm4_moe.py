"""GLM-4.5, 4.6 and 4.7 (`glm4_moe`): half of each head is turned, sigmoid router, a shared expert."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_gqa, read_model, read_norm
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.routed_experts import read_experts, read_first_dense, read_groups, read_routed
from jax_moe_lora.models.neutral_fields import QKV_BIAS, Values
from jax_moe_lora.models.specs.mlp import DenseMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = dict.fromkeys(QKV_BIAS, (False,)) | {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
# Layers behind the last one, which predict further tokens, are not run.
ANY_VALUE = ("num_mtp_layers", "num_nextn_predict_layers")


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL, ANY_VALUE)
    norm = read_norm(fields, 1e-5)
    attention = read_gqa(
        fields,
        rotary_factor=0.5,
        norm=norm,
        qk_norm="head" if fields.flag("use_qk_norm", False) else None,
        biases="qkv" if fields.flag("attention_bias", False) else "",
    )
    moe = read_experts(
        fields,
        fields.flag("norm_topk_prob", True),
        router="sigmoid_bias",
        scaling=fields.positive("routed_scaling_factor", 1.0),
        group_score="top2_sum",
        **read_groups(fields, (1, 1)),
    )
    routed = read_routed(fields, moe, choice_bias=True)
    dense = DenseMLP(fields.size("intermediate_size"), moe.activation)
    layers = [LayerSpec(attention, routed if here else dense, norm) for here in read_first_dense(fields, 1)]
    return read_model(fields, generation, layers, model_type="glm4_moe")


FAMILY = Family("glm4_moe", read_config, prediction_layers=True)
