"""Paged layers whose experts are quantised and packed for the Hopper kernels."""

from dataclasses import replace

import jax.numpy as jnp

from pallas_kernels.ops import ExpertWeights, Quantised, dequantise, pack, quantise
from pallas_kernels.quantised.format import Format
from support.paged import MODULES, PagedLayer


def packed(layer: PagedLayer, form: Format | str) -> PagedLayer:
    """The layer over packed experts."""
    return _mapped(layer, lambda weight: pack(quantise(weight, form)))


def wide(layer: PagedLayer) -> PagedLayer:
    """The same layer over what its experts' bits mean, in float32: for the oracle."""
    return _mapped(layer, lambda weight: dequantise(weight, jnp.float32) if isinstance(weight, Quantised) else weight)


def _mapped(layer: PagedLayer, function) -> PagedLayer:
    weights = {module: function(getattr(layer.experts, module)) for module in MODULES}
    biases = {name: value for name, value in vars(layer.experts).items() if name.endswith("_bias")}
    return replace(layer, experts=ExpertWeights(**weights, **biases))
