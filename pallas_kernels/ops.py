"""Grouped matmul and grouped LoRA for Mixture-of-Experts layers. Knows jax alone: no models, no adapter files."""

from pallas_kernels.activations import Activation
from pallas_kernels.backend import Choice, Implementation, UnsupportedImplementation, choose
from pallas_kernels.dispatch.api import token_rows
from pallas_kernels.grouped_lora import RANK_PAGE, LoRAPages, grouped_lora, page_gradients, shrink
from pallas_kernels.grouped_matmul import (
    choose_for,
    gated_products,
    grouped_matmul,
    input_gradient,
    lora_steps,
    weight_gradient,
)
from pallas_kernels.plan.api import BASE_SLOT, RoutingPlan, Tiles, make_plan

__all__ = [
    "BASE_SLOT",
    "RANK_PAGE",
    "Activation",
    "Choice",
    "Implementation",
    "LoRAPages",
    "RoutingPlan",
    "Tiles",
    "UnsupportedImplementation",
    "choose",
    "choose_for",
    "gated_products",
    "grouped_lora",
    "grouped_matmul",
    "input_gradient",
    "lora_steps",
    "make_plan",
    "page_gradients",
    "shrink",
    "token_rows",
    "weight_gradient",
]
