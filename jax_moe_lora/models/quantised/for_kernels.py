"""Experts in few bits, in the layout that the kernels of this device stream (`pallas_kernels.quantised.packing`)."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding

from jax_moe_lora.adapters.lora import EXPERT_MODULES
from pallas_kernels.errors import UnsupportedImplementation
from pallas_kernels.ops import Format, Implementation, Quantised, choose, pack
from pallas_kernels.quantised.packing import MAX_E8M0, why_not_packed
from pallas_kernels.quantised.split import split_specs

Layers = tuple[Mapping[str, Any], ...]


def packed_format(
    format: Format, rows: int, columns: int, dtype: jax.typing.DTypeLike, implementation: Implementation | None
) -> Format:
    """The format with the layout that matrices get: packed where the Hopper kernels would multiply them.

    Args:
      format: of the matrices, in rows.
      rows: of a matrix, or of a device's part of it.
      columns: likewise.
      dtype: of the rows that they multiply.
      implementation: a backend by name, or None for the best.
    """
    packed = replace(format, layout="hopper")
    if why_not_packed(format, rows, columns):
        return format
    try:
        picked = choose(implementation, dtype=dtype, widths=(rows, columns), operands=(packed,)).picked
    except UnsupportedImplementation:
        return format
    return packed if picked == "hopper" else format


def pack_experts(layers: Layers, dtype: jax.typing.DTypeLike, implementation: Implementation | None = None) -> Layers:
    """A model's layers, with experts packed where the Hopper kernels multiply them: all of a layer's, or none.

    One stack after the other, whose memory in rows is given up: the layers that come in are not to be used again.
    On several devices each packs its own part.

    Args:
      layers: each layer's arrays by name.
      dtype: of the rows that experts multiply.
      implementation: a backend by name, or None for the best.
    """
    return tuple(layer if _why_not(layer, dtype, implementation) else _packed_layer(layer) for layer in layers)


def packed_shapes(layers: Layers, dtype: jax.typing.DTypeLike, implementation: Implementation | None = None) -> Layers:
    """What `pack_experts` makes of such layers, as shapes alone.

    Args:
      layers: each layer's `jax.ShapeDtypeStruct` by name.
      dtype: of the rows that experts multiply.
      implementation: a backend by name, or None for the best.
    """
    return tuple(
        layer
        if _why_not(layer, dtype, implementation)
        else {**layer, **{name: jax.eval_shape(pack, layer[name]) for name in EXPERT_MODULES}}
        for layer in layers
    )


def _why_not(layer: Mapping[str, Any], dtype: jax.typing.DTypeLike, implementation: Implementation | None) -> bool:
    experts = [layer[name] for name in EXPERT_MODULES if name in layer]
    if not experts or not all(isinstance(weight, Quantised) for weight in experts):
        return True
    if len({weight.format for weight in experts[:2]}) > 1:  # gate and up are one call
        return True
    return not all(_packs(weight, dtype, implementation) for weight in experts)


def _packs(weight: Quantised, dtype: jax.typing.DTypeLike, implementation: Implementation | None) -> bool:
    """Whether one stack can be packed, its numbers too."""
    values = weight.values
    rows, columns = (values.sharding.shard_shape(values.shape) if values.sharding else values.shape)[-2:]
    form = packed_format(weight.format, rows, columns * weight.format.per_byte, dtype, implementation)
    if form.layout == "rows":
        return False
    if form.codec != "mxfp4" or isinstance(weight.scales, jax.ShapeDtypeStruct):
        return True
    return int(weight.scales.max()) <= MAX_E8M0


def _packed_layer(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    packed: dict[str, Quantised] = {}
    for name in EXPERT_MODULES:
        weight = layer[name]
        sharding = weight.values.sharding
        packed[name] = _packed(weight, sharding if isinstance(sharding, NamedSharding) else None)
        # What jit returns as it is stays; the rest would be there twice until the last layer is packed.
        kept = {id(leaf) for leaf in jax.tree.leaves(packed[name])}
        for leaf in jax.tree.leaves(weight):
            if id(leaf) not in kept:
                leaf.delete()
    return {**layer, **packed}


@partial(jax.jit, static_argnums=1)
def _packed(weight: Quantised, sharding: NamedSharding | None) -> Quantised:
    if sharding is None:
        return pack(weight)
    before, after = (split_specs(w, sharding.spec) for w in (weight, jax.eval_shape(pack, weight)))
    return jax.shard_map(pack, mesh=sharding.mesh, in_specs=(before,), out_specs=after)(weight)
