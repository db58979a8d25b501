"""Routed experts in groups, with shared ones beside them: what the configs of DeepSeek and of its many heirs say."""

from collections.abc import Sequence
from typing import Any

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models.decoder_config import read_layers, read_moe
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import Values
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP

RENORMALIZE_EPS = 1e-20
EXPERTS_NAMES = ("n_routed_experts", "num_local_experts", "num_experts")
SIGMOID: Values = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
"""What such a router does whatever its config says."""


def read_experts(
    fields: Fields, renormalize: bool, experts_names: tuple[str, ...] = EXPERTS_NAMES, **others: Any
) -> MoEConfig:
    """The routed experts.

    Args:
      fields: the config's.
      renormalize: as in `MoEConfig`.
      experts_names: the fields that may hold E.
      others: further fields of `MoEConfig`.

    Raises:
      ConfigError: a field that is missing, malformed or not supported, by name.
    """
    eps = RENORMALIZE_EPS if renormalize else 0.0
    return read_moe(fields, "moe_intermediate_size", renormalize, experts_names, renormalize_eps=eps, **others)


def read_groups(
    fields: Fields, default: tuple[int, int], experts_names: tuple[str, ...] = ("n_routed_experts",)
) -> dict[str, Any]:
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


def read_routed(fields: Fields, moe: MoEConfig, shared_name: str = "n_shared_experts", **others: Any) -> RoutedMLP:
    """The routed experts with the shared ones, which are one MLP of their joint width.

    Args:
      fields: the config's.
      moe: the routed ones.
      shared_name: the field that holds how many experts every token goes through.
      others: further fields of `RoutedMLP`.
    """
    width = moe.expert_width * fields.size(shared_name)
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


def read_sigmoid_routed(
    fields: Fields, experts_names: tuple[str, ...], shared_name: str, *, renormalize: bool, scaling: float
) -> RoutedMLP:
    """Routed experts and the shared ones, which are one of their joint width.

    Args:
      fields: the config's.
      experts_names: the fields that may hold E.
      shared_name: the field that holds how many experts every token goes through.
      renormalize: what the family's class has for a config without `norm_topk_prob`.
      scaling: likewise, without `routed_scaling_factor`.

    Raises:
      ConfigError: a field that is missing, malformed or not supported, by name.
    """
    moe = read_experts(
        fields,
        fields.flag("norm_topk_prob", renormalize),
        experts_names,
        router="sigmoid_bias",
        scaling=fields.positive("routed_scaling_factor", scaling),
        group_score="top2_sum",
        **read_groups(fields, (1, 1), experts_names),
    )
    return read_routed(fields, moe, shared_name, router_float32=True, choice_bias=True)
