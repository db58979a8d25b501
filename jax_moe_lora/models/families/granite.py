"""What the configs of Granite's Mixtures of Experts have in common."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import read_gqa, read_layers, read_model, read_moe, read_norm
from jax_moe_lora.models.families.family import Family, ReadConfig
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.fused_mlp import FusedMLP
from jax_moe_lora.models.specs.mlp import RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = dict.fromkeys((*QK_NORM, *QKV_BIAS), (False,))


def read_granite(
    fields: Fields, generation: Mapping[str, Any] | None, shared: FusedMLP | None, model_type: str
) -> ModelConfig:
    """The model's config.

    Args:
      fields: the config's.
      generation: `generation_config.json`.
      shared: the expert that every token goes through, where there is one.
      model_type: the family's.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    norm = read_norm(fields, 1e-6)
    attention = read_gqa(
        fields,
        norm=norm,
        biases="qkvo" if fields.flag("attention_bias", False) else "",
        scale=fields.positive("attention_multiplier", 1.0),
    )
    moe = read_moe(fields, "intermediate_size", renormalize=False, router="topk_softmax")
    residual_scale = fields.positive("residual_multiplier", 1.0)
    count = read_layers(fields)
    fields.expect_all("layer_types", "full_attention", count)
    return read_model(
        fields,
        generation,
        [LayerSpec(attention, RoutedMLP(moe, shared=shared), norm, residual_scale=residual_scale)] * count,
        model_type=model_type,
        embedding_scale=fields.positive("embedding_multiplier", 1.0),
        logit_scale=1 / fields.positive("logits_scaling", 1.0),
    )


def granite_family(model_type: str, read_config: ReadConfig) -> Family:
    """Granite's names: two stacks of all experts in published checkpoints, and `experts` in transformers 5.

    Args:
      model_type: the family's.
      read_config: reads its configs.
    """
    return Family(
        model_type,
        read_config,
        paths={"router": ("block_sparse_moe.router.weight", "block_sparse_moe.router.layer.weight")},
        experts_path="block_sparse_moe.experts",
        stacks={
            "gate_up_proj": ("block_sparse_moe.input_linear.weight",),
            "down_proj": ("block_sparse_moe.output_linear.weight",),
        },
    )
