"""The Flax modules: `from jax_moe_lora.nn import MoELoRA`."""

from jax_moe_lora.layer.nn import (
    Adapters,
    LoRALinear,
    LoRAParam,
    LoRATable,
    MoELoRA,
    RoutedExperts,
    Router,
    linen_variables,
    load,
    moe_sites,
)

__all__ = [
    "Adapters",
    "LoRALinear",
    "LoRAParam",
    "LoRATable",
    "MoELoRA",
    "RoutedExperts",
    "Router",
    "linen_variables",
    "load",
    "moe_sites",
]
