"""What the configs of DeepSeek-V2, DeepSeek-V3 and the families with their attention have in common."""

import math
from collections.abc import Sequence
from typing import Any

from jax_moe_lora.config import MoEConfig, RopeConfig
from jax_moe_lora.models.decoder_config import MOST, read_activation, read_layers
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
RENORMALIZE_EPS = 1e-20


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


def read_experts(fields: Fields, renormalize: bool, **others: Any) -> MoEConfig:
    """The routed experts.

    Args:
      fields: the config's.
      renormalize: as in `MoEConfig`.
      others: further fields of `MoEConfig`.

    Raises:
      ConfigError: a field that is missing, malformed or not supported, by name.
    """
    local = fields.optional_size("num_local_experts") or fields.optional_size("num_experts")
    experts, top_k = fields.size("n_routed_experts", local), fields.size("num_experts_per_tok")
    if local not in (None, experts):
        raise fields.error(f"n_routed_experts is {experts}, but {local} by its other name")
    if experts > MOST:
        raise fields.error(f"n_routed_experts is {experts}, at most {MOST} are supported")
    if top_k > experts:
        raise fields.error(f"num_experts_per_tok is {top_k}, more than the {experts} experts")
    return MoEConfig(
        hidden_size=fields.size("hidden_size"),
        expert_width=fields.size("moe_intermediate_size"),
        num_experts=experts,
        top_k=top_k,
        renormalize=renormalize,
        renormalize_eps=RENORMALIZE_EPS if renormalize else 0.0,
        activation=read_activation(fields),
        **others,
    )


def read_groups(
    fields: Fields, default: tuple[int, int], experts_names: tuple[str, ...] = ("n_routed_experts",)
) -> dict[str, int]:
    """`num_groups` and `top_groups` of `MoEConfig`.

    Args:
      fields: the config's.
      default: what the family's class has for a config that says none.
      experts_names: the fields that may hold E.

    Raises:
      ConfigError: groups that the experts do not fill, or that leave a token too few of them.
    """
    groups, kept = fields.size("n_group", default[0]), fields.size("topk_group", default[1])
    experts = next(filter(None, map(fields.get, experts_names)), None)
    top_k = fields.get("num_experts_per_tok")
    if isinstance(experts, int) and experts % groups:
        raise fields.error(f"n_group is {groups}, no divisor of the {experts} experts", "n_group")
    if kept > groups:
        raise fields.error(f"topk_group is {kept}, more than the {groups} groups", "topk_group")
    if isinstance(experts, int) and isinstance(top_k, int) and experts // groups * kept < top_k:
        raise fields.error(f"topk_group is {kept}, too few groups for {top_k} experts a token", "topk_group")
    return {"num_groups": groups, "top_groups": kept}


def read_routed(fields: Fields, moe: MoEConfig, **others: Any) -> RoutedMLP:
    """The routed experts with the shared ones, which are one MLP of their joint width.

    Args:
      fields: the config's.
      moe: the routed ones.
      others: further fields of `RoutedMLP`.
    """
    width = moe.expert_width * fields.size("n_shared_experts")
    return RoutedMLP(moe, shared=DenseMLP(width, moe.activation, "shared", "mlp.shared_experts"), **others)


def read_first_dense(fields: Fields, default: int) -> Sequence[bool]:
    """Which layers are routed: those behind the first `first_k_dense_replace`.

    Args:
      fields: the config's.
      default: what the family's class has for a config that says none.
    """
    count, dense = read_layers(fields), fields.get("first_k_dense_replace", default)
    if isinstance(dense, bool) or not isinstance(dense, int) or not 0 <= dense < count:
        name = "first_k_dense_replace"
        raise fields.error(f"{name} is {dense!r}, a number of layers below {count} was expected", name)
    return [layer >= dense for layer in range(count)]


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
