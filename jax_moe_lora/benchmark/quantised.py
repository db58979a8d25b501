"""The weights of a layer that is timed, quantised."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
from jax import lax
from jaxtyping import Array, Float

from jax_moe_lora.errors import InputError
from jax_moe_lora.models.quantised.schemes import SCHEMES
from pallas_kernels.ops import ExpertWeights, Format, Quantised, quantise
from pallas_kernels.specs import LAYERS


def check_schemes(shapes: Sequence[str], schemes: Sequence[str]) -> None:
    """Checks, before anything is measured, that the weights of layers can be quantised.

    Args:
      shapes: layers in `specs.LAYERS`; others are passed over.
      schemes: names in `quantised.schemes.SCHEMES`.

    Raises:
      InputError: an unknown scheme, or a width that its format does not divide, by name.
    """
    for scheme in schemes:
        if scheme not in SCHEMES:
            raise InputError(f"--quantise is {scheme!r}; expected one of {', '.join(SCHEMES)}.")
        multiple = SCHEMES[scheme].block[1] if SCHEMES[scheme].per_byte == 2 else 1
        for shape in (name for name in shapes if name in LAYERS):
            for columns in (LAYERS[shape].hidden_size, LAYERS[shape].expert_width):
                if columns % multiple:
                    raise InputError(
                        f"--shape {shape} has matrices of {columns} columns, and {scheme} takes multiples of "
                        f"{multiple}; leave one of them out."
                    )


def quantised(experts: ExpertWeights, scheme: str) -> ExpertWeights:
    """The same weights in few bits.

    Args:
      experts: in 16 bits.
      scheme: a name in `quantised.schemes.SCHEMES` that `check_schemes` let pass.
    """
    gate, up, down = (_quantise(weights, SCHEMES[scheme]) for weights in (experts.gate, experts.up, experts.down))
    return replace(experts, gate=gate, up=up, down=down)


@partial(jax.jit, static_argnums=1)
def _quantise(weights: Float[Array, "E out in"], format: Format) -> Quantised:
    """One expert after the other, so that only one matrix at a time is float32."""
    return lax.map(lambda weight: quantise(weight, format, weights.dtype), weights)
