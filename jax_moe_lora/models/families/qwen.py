"""What the configs of Qwen2-MoE and Qwen3-MoE have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_activation, read_moe, read_sparse_layers
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import Values
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec
from jax_moe_lora.models.specs.parameter import Norm


def open_qwen(raw: Mapping[str, Any], source: str, neutral: Values, any_value: tuple[str, ...] = ()) -> Fields:
    """The fields of a config without sliding windows.

    Args:
      raw: the config.
      source: what errors call the file.
      neutral: what the family's class does whatever its config says, as in `neutral_fields.ONE_VALUE`.
      any_value: the family's own fields that are passed over whatever they say.
    """
    fields = open_fields(raw, source, neutral, any_value=("max_window_layers", "sliding_window", *any_value))
    fields.expect("use_sliding_window", (None, False), "sliding-window attention is not supported")
    return fields


def read_qwen_layers(
    fields: Fields, attention: GQA, norm: Norm, renormalize: bool | None = None, **routed: Any
) -> Sequence[LayerSpec]:
    """The layers, dense or routed, by `decoder_sparse_step` and `mlp_only_layers`.

    Args:
      fields: the config's.
      attention: of every layer.
      norm: of every layer.
      renormalize: as in `MoEConfig`; None for what `norm_topk_prob` says.
      routed: further fields of `RoutedMLP`.
    """
    is_routed = read_sparse_layers(fields)
    fields.expect_all("layer_types", "full_attention", len(is_routed))
    if renormalize is None:
        renormalize = fields.flag("norm_topk_prob", False)
    experts = RoutedMLP(read_moe(fields, "moe_intermediate_size", renormalize), **routed)
    if all(is_routed) and not fields.get("intermediate_size"):
        return [LayerSpec(attention, experts, norm)] * len(is_routed)
    dense = DenseMLP(fields.size("intermediate_size"), read_activation(fields))
    return [LayerSpec(attention, experts if routed_here else dense, norm) for routed_here in is_routed]
