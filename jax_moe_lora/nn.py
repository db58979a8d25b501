"""The Flax modules: `from jax_moe_lora.nn import MoELoRA`."""

from jax_moe_lora.layer.nn import LoRALinear, LoRAParam, MoELoRA, RoutedExperts, Router, load, moe_sites

__all__ = ["LoRALinear", "LoRAParam", "MoELoRA", "RoutedExperts", "Router", "load", "moe_sites"]
