"""Grouped matmul: each sorted row times the weight of its expert."""

from pallas_kernels.grouped_matmul.api import choose_for, grouped_matmul, lora_steps, weight_gradient

__all__ = ["choose_for", "grouped_matmul", "lora_steps", "weight_gradient"]
