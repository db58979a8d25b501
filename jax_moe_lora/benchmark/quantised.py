"""The weights of a layer that is timed, quantised."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_moe_lora.adapters.lora import EXPERT_MODULES
from jax_moe_lora.errors import InputError
from jax_moe_lora.models.quantised.for_kernels import pack_experts
from jax_moe_lora.models.quantised.schemes import SCHEMES
from pallas_kernels.ops import ExpertWeights, Format, Implementation, Quantised, quantise
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


def quantised(
    experts: ExpertWeights,
    scheme: str,
    implementation: Implementation | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> ExpertWeights:
    """The same weights in few bits, packed where a loaded model's would be.

    Args:
      experts: in 16 bits.
      scheme: a name in `quantised.schemes.SCHEMES` that `check_schemes` let pass.
      implementation: a backend by name, or None for the best.
      dtype: of the rows.
    """
    in_rows = {name: _quantise(getattr(experts, name), SCHEMES[scheme]) for name in EXPERT_MODULES}
    (weights,) = pack_experts((in_rows,), dtype, implementation)
    return replace(experts, **weights)


@partial(jax.jit, static_argnums=1)
def _quantise(weights: Float[Array, "E out in"], format: Format) -> Quantised:
    """One expert after the other, so that only one matrix at a time is float32."""
    return lax.map(lambda weight: quantise(weight, format, weights.dtype), weights)
