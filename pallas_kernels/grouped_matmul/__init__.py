"""Grouped matmul: each sorted row times the weight of its expert."""

from pallas_kernels.grouped_matmul.api import (
    choose_for,
    gated_products,
    grouped_matmul,
    input_gradient,
    lora_steps,
    weight_gradient,
)

__all__ = ["choose_for", "gated_products", "grouped_matmul", "input_gradient", "lora_steps", "weight_gradient"]
