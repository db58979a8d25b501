"""Grouped LoRA: each sorted row's adapter added to it, through paged A and B matrices."""

from pallas_kernels.grouped_lora.api import LoRAPages, grouped_lora, page_gradients, shrink
from pallas_kernels.pages import RANK_PAGE

__all__ = ["RANK_PAGE", "LoRAPages", "grouped_lora", "page_gradients", "shrink"]
