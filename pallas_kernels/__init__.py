"""Grouped matmul and grouped LoRA for Mixture-of-Experts layers. Knows jax alone.

The public ops are in `pallas_kernels.ops`.
"""
