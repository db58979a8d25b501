"""Plots of routing, parity and curves: `from jax_moe_lora import plots`."""

from jax_moe_lora.inspect.plots import coactivation, expert_load, heatmaps, lines, parity, pyplot

__all__ = ["coactivation", "expert_load", "heatmaps", "lines", "parity", "pyplot"]
