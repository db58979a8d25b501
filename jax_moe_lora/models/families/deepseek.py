"""What the configs of DeepSeek-V2, DeepSeek-V3 and the families with their attention have in common."""

import math
from collections.abc import Sequence
from typing import Any

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import Values
from jax_moe_lora.models.rope_config import read_rope
from jax_moe_lora.models.specs.mla import MLA
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec
from jax_moe_lora.models.specs.parameter import Norm

# What the classes in transformers do whatever their configs say.
NEUTRAL: Values = {"moe_layer_freq": (1,)}
# How many layers behind the last one predict further tokens: they are not used.
ANY_VALUE = ("num_mtp_layers", "num_nextn_predict_layers")


def read_mla(fields: Fields, **others: Any) -> MLA:
    """The attention: its widths, its rotary embedding and the factor on its scores.

    Args:
      fields: the config's.
      others: further fields of `MLA`, or other values.

    Raises:
      ConfigError: a field that is missing, malformed or not supported, by name.
    """
    heads = fields.size("num_attention_heads")
    nope, rotary, value = (fields.size(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    if rotary % 2:
        raise fields.error(f"qk_rope_head_dim is {rotary}, an even one was expected: rotary embedding turns pairs")
    fields.expect("num_key_value_heads", (None, heads), f"each of the {heads} heads has keys and values of its own")
    fields.expect("qk_head_dim", (None, nope + rotary), "it is qk_nope_head_dim and qk_rope_head_dim together")
    rope = read_rope(fields, fields.size("max_position_embeddings"), 10_000.0)
    read = {
        "rope": rope,
        "scale": (nope + rotary) ** -0.5 * yarn_factor(rope) ** 2,
        "biases": fields.flag("attention_bias", False),
        "interleaved": fields.flag("rope_interleave", True),
    }
    return MLA(
        heads, nope, rotary, value, fields.size("kv_lora_rank"), fields.optional_size("q_lora_rank"), **(read | others)
    )


def yarn_factor(rope: RopeConfig) -> float:
    """What a context that is extended by YaRN multiplies queries and keys by, all of their widths.

    Args:
      rope: the rotary embedding.
    """
    if rope.kind == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return 0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0


def layer_specs(
    fields: Fields, attention: MLA, routed: RoutedMLP, norm: Norm, is_routed: Sequence[bool]
) -> list[LayerSpec]:
    """The layers, of which some are dense.

    Args:
      fields: the config's.
      attention: of every layer.
      routed: the MLP of the routed layers.
      norm: of every layer.
      is_routed: which these are.
    """
    dense = None if all(is_routed) else DenseMLP(fields.size("intermediate_size"), routed.moe.activation)
    if dense is None:
        fields.get("intermediate_size")
    return [LayerSpec(attention, routed if here or dense is None else dense, norm) for here in is_routed]
