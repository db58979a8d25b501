"""How a model is split over several devices: one table from the logical axes of its arrays to the axes of a mesh.

A mesh has some of three axes. `data`: each part has requests of its own, and the whole model. `expert`: each part has
some of the experts, and their adapters' pages. `tensor`: each part has some heads and some columns of each expert. What
the table does not name is whole on every device.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_moe_lora.adapters.lora import Site, SplitWidth
from jax_moe_lora.errors import InputError
from jax_moe_lora.mesh.processes import check_processes
from jax_moe_lora.models.blocks.partial_sums import EXPERT_AXIS, TENSOR_AXIS
from jax_moe_lora.models.cache import Cache
from jax_moe_lora.models.params import ModelParams, abstract_params, leaf_name
from jax_moe_lora.models.specs.model import ModelConfig, layer_parameters, sizes_of_attention
from jax_moe_lora.models.specs.parameter import Axis, Parameter
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.format import Format
from pallas_kernels.quantised.split import cut_block, split_specs

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices, or the sizes of its axes alone."""
DATA_AXIS = "data"
AXES = (DATA_AXIS, EXPERT_AXIS, TENSOR_AXIS)
RULES: Mapping[Axis, tuple[str, ...]] = {
    "expert": (EXPERT_AXIS,),
    "expert_mlp": (TENSOR_AXIS,),
    "heads": (TENSOR_AXIS,),
    "kv_heads": (TENSOR_AXIS,),
    "mlp": (EXPERT_AXIS, TENSOR_AXIS),  # every token goes through it, so that both axes may share the work
}
"""Logical axis -> the mesh axes that split it, outermost first."""
_NAMES: Mapping[Axis, str] = {
    "expert": "experts",
    "expert_mlp": "columns of an expert",
    "heads": "heads",
    "kv_heads": "key/value heads",
    "mlp": "columns of an MLP",
}


def make_mesh(mesh: str | Mesh | None) -> Mesh | None:
    """The mesh that a user names.

    Args:
      mesh: text such as `"data=2,expert=4"`, which takes the first devices, neighbours along `tensor` first; a mesh of
        jax whose axes have these names; or None.

    Raises:
      InputError: another form, an axis that is not known or named twice, or more devices than there are.
    """
    if mesh is None:
        return None
    if isinstance(mesh, Mesh):
        sizes = dict(mesh.shape)
        _check_axes(sizes, mesh)
        if {device.process_index for device in mesh.devices.flat} != {jax.process_index()}:
            check_processes(mesh)
        return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(sizes))
    sizes = parse_mesh(mesh)
    devices, count = jax.devices(), math.prod(sizes.values())
    if count > len(devices):
        raise InputError(f"mesh {mesh!r} needs {count} devices; jax has {len(devices)} here ({devices[0].platform}).")
    names = tuple(axis for axis in AXES if axis in sizes)
    grid = np.array(devices[:count]).reshape([sizes[axis] for axis in names])
    made = Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))
    check_processes(made)
    return made


def parse_mesh(text: Any) -> dict[str, int]:
    """The sizes that text names, such as `"data=2,expert=4"`.

    Args:
      text: AXIS=SIZE, several with commas between them.

    Raises:
      InputError: another form, or an axis that is not known or named twice.
    """
    if not isinstance(text, str):
        raise InputError(f"mesh is of type {type(text).__name__}; expected text such as 'data=2,expert=4', or a Mesh.")
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        axis, _, size = (part.strip() for part in entry.partition("="))
        if not size.isascii() or not size.isdigit() or int(size) < 1:
            raise InputError(f"mesh {text!r} has {entry!r}; expected AXIS=SIZE, such as 'expert=4'.")
        if axis in sizes:
            raise InputError(f"mesh {text!r} has the axis {axis!r} twice.")
        sizes[axis] = int(size)
    _check_axes(sizes, text)
    return sizes


def _check_axes(sizes: Mapping[str, int], mesh: Any) -> None:
    for axis in sizes:
        if axis not in AXES:
            raise InputError(f"mesh {mesh!r} has the axis {axis!r}; expected some of {', '.join(AXES)}.")


def parts(mesh: AnyMesh, axis: str) -> int:
    """Parts along an axis of the mesh; 1 where it has no such axis."""
    return mesh.shape.get(axis, 1)


def check_mesh(config: ModelConfig, mesh: AnyMesh) -> None:
    """Refuses a mesh that does not divide the model, before anything is allocated.

    Args:
      config: the model's.
      mesh: the devices.

    Raises:
      InputError: what is not divided, with its size.
    """
    for index, what, size, axes in _divided(config):
        count = math.prod(parts(mesh, axis) for axis in axes)
        if size % count:
            named = " x ".join(f"{axis}={parts(mesh, axis)}" for axis in axes if parts(mesh, axis) > 1)
            raise InputError(
                f"The mesh's {named} does not divide the {size} {what} of layer {index}; choose a divisor of them."
            )


def _divided(config: ModelConfig) -> Iterator[tuple[int, str, int, tuple[str, ...]]]:
    """What a mesh may divide: layer, name, size and the mesh axes."""
    for layer in config.kinds:
        index, attention = config.layers.index(layer), sizes_of_attention(layer)
        for row in layer_parameters(layer, config.hidden_size):
            for width, axis in zip(row.shape, row.axes, strict=True):
                if axis in RULES:  # a head is not divided
                    heads = {"heads": "num_heads", "kv_heads": "num_kv_heads"}.get(axis)
                    size = width if heads is None else getattr(attention, heads)
                    yield index, _NAMES[axis], size, RULES[axis]


def spec_of(axes: tuple[Axis | None, ...], mesh: AnyMesh) -> P:
    """How an array is split.

    Args:
      axes: the logical name of each of its axes.
      mesh: the devices.
    """
    return P(*(mesh_axes(axis, mesh) or None for axis in axes))


def mesh_axes(axis: Axis | None, mesh: AnyMesh) -> tuple[str, ...]:
    """The axes of the mesh that split a logical axis, those of one part left out."""
    return tuple(name for name in (RULES.get(axis, ()) if axis else ()) if parts(mesh, name) > 1)


def rows_spec(mesh: Mesh) -> P:
    """How arrays are split whose first axis is that of requests, or of their tokens."""
    return P(DATA_AXIS) if DATA_AXIS in mesh.shape else P()


def check_blocks(config: ModelConfig, mesh: Mesh, formats: Mapping[str, Format]) -> None:
    """Refuses a mesh that would cut through the blocks of a quantised matrix that share a scale.

    Args:
      config: the model's.
      mesh: the devices.
      formats: of the matrices that are quantised (`models.loading.stored_formats`).

    Raises:
      InputError: the matrix, the mesh's axes and the block.
    """
    for index, layer in enumerate(config.layers):
        for row in layer_parameters(layer, config.hidden_size):
            format = formats.get(f"layers.{index}.{row.name}")
            if format is None:
                continue
            axes = [mesh_axes(axis, mesh) for axis in row.axes[-2:]]
            rows, columns = row.shape[-2:]
            if cut := cut_block(format, rows, columns, (_count(mesh, axes[0]), _count(mesh, axes[1]))):
                sizes = " x ".join(f"{axis}={parts(mesh, axis)}" for axis in dict.fromkeys((*axes[0], *axes[1])))
                raise InputError(
                    f"The mesh's {sizes} cuts through {cut} of layers.{index}.{row.name} [{rows}, {columns}], which "
                    f"share a scale in {format.name}; choose a smaller divisor."
                )


def param_specs(config: ModelConfig, mesh: Mesh, params: ModelParams | None = None) -> ModelParams:
    """How each parameter is split: a tree of the form of `ModelParams`.

    Args:
      config: the model's.
      mesh: the devices.
      params: the parameters, or their shapes, where some of them are quantised.
    """

    def spec(path: tuple[Any, ...], leaf: Any) -> Any:
        of_matrix = P()
        if leaf_name(path[0]) == "layers":
            rows = layer_parameters(config.layers[path[1].idx], config.hidden_size)
            of_matrix = spec_of(next(row.axes for row in rows if row.name == leaf_name(path[2])), mesh)
        return split_specs(leaf, of_matrix) if isinstance(leaf, Quantised) else of_matrix

    tree = abstract_params(config, np.float32) if params is None else params
    return jax.tree.map_with_path(spec, tree, is_leaf=lambda leaf: isinstance(leaf, Quantised))


def cache_specs(config: ModelConfig, mesh: Mesh, cache: Cache) -> Cache:
    """How each array of a cache is split.

    Args:
      config: the model's.
      mesh: the devices.
      cache: a cache, or its shapes.
    """
    batch = tuple(rows_spec(mesh)) or (None,)

    def spec(path: tuple[Any, ...], leaf: Any) -> P:
        if leaf_name(path[0]) != "layers":
            return P(*batch)
        behind = getattr(sizes_of_attention(config.layers[path[1].idx]), "cache_axes", ())
        return P(*batch, *spec_of(behind, mesh))

    return jax.tree.map_with_path(spec, cache)


def split_sites(config: ModelConfig, sites: Mapping[str, Site], mesh: AnyMesh) -> dict[str, Site]:
    """Sites that say how a mesh splits the pages of their adapters: as the projection's own rows and columns.

    Args:
      config: the model's.
      sites: its projections.
      mesh: the devices.
    """
    rows: dict[str, Parameter] = {}
    for layer in config.kinds:
        rows |= {row.name: row for row in layer_parameters(layer, config.hidden_size) if row.projection}
    return {module: _split_site(site, rows.get(module), mesh) for module, site in sites.items()}


def _split_site(site: Site, row: Parameter | None, mesh: AnyMesh) -> Site:
    regions = mesh_axes("expert", mesh) if row is not None and row.experts else ()
    of_in, of_out = (None, None) if row is None else row.axes[:-3:-1]  # embedding and head are whole

    def split(width: int, axis: Axis | None) -> SplitWidth:
        axes = mesh_axes(axis, mesh)
        return SplitWidth(width, _count(mesh, axes), axes, _count(mesh, regions), regions)

    return replace(site, split=(split(site.in_width, of_in), split(site.out_width, of_out)))


def _count(mesh: AnyMesh, axes: tuple[str, ...]) -> int:
    return math.prod(parts(mesh, axis) for axis in axes)


def shardings(specs: Any, mesh: Mesh) -> Any:
    """A tree of `PartitionSpec` as a tree of shardings.

    Args:
      specs: the tree.
      mesh: the devices.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P))
