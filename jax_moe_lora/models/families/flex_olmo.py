"""FlexOlmo: the blocks of OLMo 2, with routed experts."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_gqa, read_layers, read_model, read_moe, read_norm
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.neutral_fields import QK_NORM, Values
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = dict.fromkeys(QK_NORM, (True,))


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL)
    norm = read_norm(fields, 1e-6, wide=True)
    attention = read_gqa(
        fields,
        5e5,
        norm=norm,
        qk_norm="projection",
        biases="qkvo" if fields.flag("attention_bias", False) else "",
    )
    moe = read_moe(fields, "intermediate_size", fields.flag("norm_topk_prob", False))
    count = read_layers(fields)
    fields.expect_all("layer_types", "full_attention", count)
    layers = [LayerSpec(attention, RoutedMLP(moe), norm, norms="after")] * count
    return read_model(fields, generation, layers, model_type="flex_olmo")


FAMILY = Family("flex_olmo", read_config)
