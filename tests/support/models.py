"""Configs of small decoders."""

from jax_moe_lora.config import MoEConfig, RopeConfig
from jax_moe_lora.models.names import adapter_names
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig


def decoder_config(
    model_type: str,
    vocab_size: int,
    hidden_size: int,
    heads: tuple[int, int, int],
    moe: MoEConfig,
    routed: tuple[bool, ...] = (True,),
    mlp_width: int = 0,
    shared_width: int = 0,
    **attention,
) -> ModelConfig:
    """A decoder with grouped-query attention.

    Args:
      model_type: a family.
      vocab_size: V.
      hidden_size: D.
      heads: query heads, key/value heads and the width of a head.
      moe: of the routed layers.
      routed: for each layer, whether its MLP is routed.
      mlp_width: inner width of the dense MLPs.
      shared_width: inner width of the shared expert, 0 for none.
      attention: further fields of `GQA`.
    """
    mixer = GQA(*heads, **({"rope": RopeConfig(), "qk_norm": "head"} | attention))
    shared = DenseMLP(shared_width, "silu", "shared", "mlp.shared_expert") if shared_width else None
    experts, dense = RoutedMLP(moe, shared=shared, shared_gate=bool(shared_width)), DenseMLP(mlp_width)
    return ModelConfig(
        model_type, vocab_size, hidden_size, tuple(LayerSpec(mixer, experts if here else dense) for here in routed)
    )


_SIZES = (32, 16, (2, 1, 8), MoEConfig(16, 12, 4, 2))
ADAPTER_NAMES = adapter_names(decoder_config("qwen3_moe", *_SIZES, (True, False), mlp_width=20))
"""Qwen3-MoE's names, of routed and of dense layers."""
MIXTRAL_NAMES = adapter_names(decoder_config("mixtral", *_SIZES))
