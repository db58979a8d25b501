"""Which matrices of a 16-bit checkpoint are quantised on request, and in which format."""

from collections.abc import Mapping

from jax_moe_lora.errors import CheckpointError, InputError
from jax_moe_lora.models.names import table
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.models.specs.parameter import Parameter
from pallas_kernels.quantised.format import FP8_BLOCK, MXFP4, Format, int4

SCHEMES: Mapping[str, Format] = {"fp8": FP8_BLOCK, "mxfp4": MXFP4, "int4": int4(32), "int4_g128": int4(128)}
"""The names that callers use -> format."""
KEPT = ("router", "shared_expert_gate", "delta_ba", "delta_b", "delta_a")
"""Projections that published checkpoints leave in 16 bits: a few rows each, on which much depends."""
GPT_OSS = "gpt_oss"
"""Published in mxfp4 with experts alone quantised."""


def quantised_formats(config: ModelConfig, scheme: str, where: object) -> dict[str, Format]:
    """The leaves of a model that a scheme quantises: routed and shared experts, attention and dense MLPs.

    Router, norms, embedding and head stay as they are, as in published checkpoints; so does all but the experts of
    gpt-oss in mxfp4.

    Args:
      config: the model.
      scheme: a name in `SCHEMES`.
      where: the checkpoint, which errors name.

    Returns:
      Path in the parameter tree, such as `layers.0.gate` -> format.

    Raises:
      InputError: an unknown scheme, or a width that the format does not divide, by name.
      CheckpointError: the checkpoint is quantised already.
    """
    if scheme not in SCHEMES:
        raise InputError(f"quantise is {scheme!r}; expected one of {', '.join(SCHEMES)}.")
    if config.quantisation is not None:
        raise CheckpointError(
            f"{where} is quantised already ({config.quantisation.method}); load it as it is, or quantise the 16-bit "
            "checkpoint."
        )
    experts_alone = scheme == "mxfp4" and config.model_type == GPT_OSS
    formats: dict[str, Format] = {}
    for layer in range(config.num_layers):
        for row in table(config, layer):
            if row.projection and not row.float32 and row.name not in KEPT and (row.experts or not experts_alone):
                formats[f"layers.{layer}.{row.name}"] = _format(SCHEMES[scheme], row, scheme, where)
    return formats


def _format(format: Format, row: Parameter, scheme: str, where: object) -> Format:
    """The format of a matrix; a group as wide as the matrix is one of whole rows, as files are read."""
    columns, width = row.shape[-1], format.block[1]
    if format.per_byte == 2 and columns % width:
        raise InputError(
            f"{row.name} of {where} has {columns} columns, and {scheme} takes multiples of {width}; quantise to fp8."
        )
    return int4(0) if format.codec == "int4" and columns == width else format
