"""Figures of routing, parity and curves: `from jax_moe_lora import plots`. Needs the `plots` extra."""

from jax_moe_lora.inspect.plots import coactivation, expert_load, heatmaps, lines, parity
from jax_moe_lora.inspect.style import pyplot, show_as_svg

__all__ = ["coactivation", "expert_load", "heatmaps", "lines", "parity", "pyplot", "show_as_svg"]
