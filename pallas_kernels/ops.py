"""The public ops: grouped matmul, grouped LoRA and the routed experts of a Mixture-of-Experts layer."""

from pallas_kernels.activations import Activation
from pallas_kernels.backend import Backend, Choice, Implementation, choose, lowering_sms
from pallas_kernels.dispatch.api import combine, token_rows
from pallas_kernels.errors import NotDifferentiable, UnsupportedImplementation
from pallas_kernels.grouped_lora.api import grouped_lora, page_gradients, shrink
from pallas_kernels.grouped_matmul.api import (
    choose_for,
    gated_products,
    grouped_matmul,
    input_gradient,
    weight_gradient,
)
from pallas_kernels.lora_steps.api import make_lora_steps
from pallas_kernels.pages import RANK_PAGE, LayerPages, LoRAPages
from pallas_kernels.plan.api import RoutingPlan, make_plan
from pallas_kernels.plan.tiles import BASE_SLOT, Tiles
from pallas_kernels.quantised.api import dequantise, quantise
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.format import Format
from pallas_kernels.quantised.packing import pack, unpack
from pallas_kernels.routed_experts.api import routed_experts
from pallas_kernels.routed_experts.weights import ExpertWeights

__all__ = [
    "BASE_SLOT",
    "RANK_PAGE",
    "Activation",
    "Backend",
    "Choice",
    "ExpertWeights",
    "Format",
    "Implementation",
    "LayerPages",
    "LoRAPages",
    "NotDifferentiable",
    "Quantised",
    "RoutingPlan",
    "Tiles",
    "UnsupportedImplementation",
    "choose",
    "choose_for",
    "combine",
    "dequantise",
    "gated_products",
    "grouped_lora",
    "grouped_matmul",
    "input_gradient",
    "lowering_sms",
    "make_lora_steps",
    "make_plan",
    "pack",
    "page_gradients",
    "quantise",
    "routed_experts",
    "shrink",
    "token_rows",
    "unpack",
    "weight_gradient",
]
