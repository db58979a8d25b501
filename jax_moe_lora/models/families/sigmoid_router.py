"""Routed experts chosen by sigmoid scores and a bias, as DeepSeek-V3's are, and shared ones beside them."""

from typing import Any

from jax_moe_lora.models.decoder_config import read_activation, read_moe
from jax_moe_lora.models.families.deepseek import RENORMALIZE_EPS, read_groups
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import Values
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP

SIGMOID: Values = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
"""What such a router does whatever its config says."""


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
    router: dict[str, Any] = {
        "router": "sigmoid_bias",
        "scaling": fields.positive("routed_scaling_factor", scaling),
        "group_score": "top2_sum",
        **read_groups(fields, (1, 1), experts_names),
    }
    renormalize = fields.flag("norm_topk_prob", renormalize)
    if renormalize:
        router["renormalize_eps"] = RENORMALIZE_EPS
    moe = read_moe(fields, "moe_intermediate_size", renormalize, experts_names, **router)
    width = moe.expert_width * fields.size(shared_name)
    shared = DenseMLP(width, read_activation(fields), "shared", "mlp.shared_experts")
    return RoutedMLP(moe, router_float32=True, choice_bias=True, shared=shared)
