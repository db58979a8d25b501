"""Experts in few bits, in the layout that the kernels of this device stream (`pallas_kernels.quantised.packing`)."""

from collections.abc import Callable, Mapping
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
    format: Format,
    rows: int,
    columns: int,
    dtype: jax.typing.DTypeLike,
    implementation: Implementation | None,
    slots: int = 0,
) -> Format:
    """The format with the layout that matrices get: packed where the Hopper kernels would multiply them.

    Args:
      format: of the matrices, in rows.
      rows: of a matrix, or of a device's part of it.
      columns: likewise.
      dtype: of the rows that they multiply.
      implementation: a backend by name, or None for the best.
      slots: adapter slots.
    """
    packed = replace(format, layout="hopper")
    if why_not_packed(format, rows, columns):
        return format
    try:
        picked = choose(implementation, dtype=dtype, widths=(rows, columns), operands=(packed,), slots=slots).picked
    except UnsupportedImplementation:
        return format
    return packed if picked == "hopper" else format


def pack_experts(
    layers: Layers, dtype: jax.typing.DTypeLike, implementation: Implementation | None = None, slots: int = 0
) -> Layers:
    """A model's layers, with experts packed where the Hopper kernels multiply them: all of a layer's, or none.

    One layer after the other, whose memory in rows is given up: the layers that come in are not to be used again, and
    no two of them may share an array. On several devices each packs its own part.

    Args:
      layers: each layer's arrays by name.
      dtype: of the rows that experts multiply.
      implementation: a backend by name, or None for the best.
      slots: adapter slots.
    """
    wanted = partial(packed_format, dtype=dtype, implementation=implementation, slots=slots)
    return tuple(_packed_layer(layer) if _packs(layer, wanted) else layer for layer in layers)


def packed_shapes(
    layers: Layers, dtype: jax.typing.DTypeLike, implementation: Implementation | None = None, slots: int = 0
) -> Layers:
    """What `pack_experts` makes of such layers, as shapes alone.

    Args:
      layers: each layer's `jax.ShapeDtypeStruct` by name.
      dtype: of the rows that experts multiply.
      implementation: a backend by name, or None for the best.
      slots: adapter slots.
    """
    wanted = partial(packed_format, dtype=dtype, implementation=implementation, slots=slots)
    return tuple(
        {**layer, **{name: jax.eval_shape(pack, layer[name]) for name in EXPERT_MODULES}}
        if _packs(layer, wanted)
        else layer
        for layer in layers
    )


def _packs(layer: Mapping[str, Any], wanted: Callable[[Format, int, int], Format]) -> bool:
    """Whether a layer's experts are of one format that the kernels take, in their numbers too."""
    experts = [layer[name] for name in EXPERT_MODULES if name in layer]
    formats = {weight.format if isinstance(weight, Quantised) else None for weight in experts}
    if len(formats) != 1 or None in formats or any(weight.format.layout != "rows" for weight in experts):
        return False
    return all(_packs_stack(weight, wanted) for weight in experts)


def _packs_stack(weight: Quantised, wanted: Callable[[Format, int, int], Format]) -> bool:
    values = weight.values
    rows, columns = (values.sharding.shard_shape(values.shape) if values.sharding else values.shape)[-2:]
    if wanted(weight.format, rows, columns * weight.format.per_byte).layout == "rows":
        return False
    if weight.format.codec != "mxfp4" or isinstance(weight.scales, jax.ShapeDtypeStruct) or not weight.scales.size:
        return True
    return int(weight.scales.max()) <= MAX_E8M0


def _packed_layer(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    packed: dict[str, Quantised] = {}
    for name in EXPERT_MODULES:
        sharding = layer[name].values.sharding
        packed[name] = _packed(layer[name], sharding if isinstance(sharding, NamedSharding) else None)
    others = [leaf for name, leaf in layer.items() if name not in EXPERT_MODULES]
    kept = {id(leaf) for leaf in jax.tree.leaves((packed, others))}
    in_rows = {id(leaf): leaf for leaf in jax.tree.leaves([layer[name] for name in EXPERT_MODULES])}
    # Until its last reference goes, an array of rows would be there beside its packed form.
    for leaf in (leaf for key, leaf in in_rows.items() if key not in kept):
        leaf.delete()
    return {**layer, **packed}


@partial(jax.jit, static_argnums=1)
def _packed(weight: Quantised, sharding: NamedSharding | None) -> Quantised:
    if sharding is None:
        return pack(weight)
    before, after = (split_specs(w, sharding.spec) for w in (weight, jax.eval_shape(pack, weight)))
    return jax.shard_map(pack, mesh=sharding.mesh, in_specs=(before,), out_specs=after)(weight)
