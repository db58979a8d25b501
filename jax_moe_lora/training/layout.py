"""Where a training step's arrays lie: on one device, or split over a mesh.

An expert's matrices of an adapter lie on the devices that have the expert, and of a projection whose columns are split
each device has its columns, as with the pages of served adapters. What is left is whole on every device. Optimizers'
moments lie where their matrices do. Each part of the `data` axis has some of a batch's rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_moe_lora.adapters.lora import SIDES, Side, Site, SplitWidth
from jax_moe_lora.errors import InputError
from jax_moe_lora.mesh.processes import across
from jax_moe_lora.mesh.rules import check_blocks, check_mesh, make_mesh, param_specs, rows_spec, shardings, split_sites
from jax_moe_lora.mesh.steps import row_multiple
from jax_moe_lora.models.loading import stored_formats
from jax_moe_lora.models.params import leaf_name
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.training.spec import AdapterSpec

Placements = dict[str, dict[str, NamedSharding]]
"""Adapter -> key of a matrix -> where it lies."""


@dataclass(frozen=True)
class StepLayout:
    """How a step's arrays are split. Make one with `step_layout`.

    Attributes:
      config: the model's.
      mesh: the devices; None for the default one.
      sites: the model's projections, of the sizes that one device has.
      adapters: adapter -> key of a matrix -> how it is split.
    """

    config: ModelConfig
    mesh: Mesh | None
    sites: Mapping[str, Site]
    adapters: Mapping[str, Mapping[str, P]]

    @property
    def row_multiple(self) -> int:
        """What the rows of a batch, or of a micro-batch, are a multiple of."""
        return row_multiple(self.mesh)

    def per_device(self, function: Callable[..., Any], out: Any, *, in_parts: bool = False) -> Callable[..., Any]:
        """`function(params, model_params, batch, *totals)`, run by each device on the parts of the arrays that it has.

        Args:
          function: its further arguments are whole on every device.
          out: how its results are split; `rows` for those of a batch's rows.
          in_parts: the batch has an axis of micro-batches before that of rows.
        """
        mesh = self.mesh
        if mesh is None:
            return function
        rows = P(None, *rows_spec(mesh)) if in_parts else rows_spec(mesh)

        def call(params: Any, model: Any, batch: Any, *whole: Any) -> Any:
            specs = self.adapters, param_specs(self.config, mesh, model), rows, *(P() for _ in whole)
            return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)(params, model, batch, *whole)

        return call

    def check_blocks(self, folder: Path) -> None:
        """Refuses a mesh that would cut through blocks of a quantised checkpoint, from its headers."""
        if self.mesh is not None and self.config.quantisation is not None:
            check_blocks(self.config, self.mesh, stored_formats(folder, self.config))

    @property
    def rows(self) -> P:
        """How results of a batch's rows are split."""
        return P() if self.mesh is None else rows_spec(self.mesh)

    @property
    def model_placement(self) -> Any:
        """Where the model's parameters lie: a tree of their form, or None for the default device."""
        return None if self.mesh is None else shardings(param_specs(self.config, self.mesh), self.mesh)

    @property
    def placements(self) -> Placements | None:
        """Where the adapters' matrices lie; None for the default device."""
        if self.mesh is None:
            return None
        return {
            name: {key: NamedSharding(self.mesh, spec) for key, spec in of_adapter.items()}
            for name, of_adapter in self.adapters.items()
        }

    def keep[State](self, state: State) -> State:
        """Inside of `jit`: a state that is split as the step found it."""
        placements = self.placements
        return state if placements is None else jax.lax.with_sharding_constraint(state, beside(state, placements))


def step_layout(config: ModelConfig, specs: Mapping[str, AdapterSpec], mesh: str | Mesh | None) -> StepLayout:
    """The layout of these adapters' steps.

    Args:
      config: the model's.
      specs: adapter -> what it trains.
      mesh: the devices, as `mesh.rules.make_mesh` takes them; None for the default one.

    Raises:
      InputError: a spec that the model cannot train, or a mesh that does not divide the model or is not of one process.
    """
    if not specs:
        raise InputError("specs are empty; give at least one adapter to train.")
    sites, devices = layer_sites(config), make_mesh(mesh)
    for name, spec in specs.items():
        spec.check(name, sites)
    if devices is None:
        return StepLayout(config, None, sites, {})
    if across(devices):
        raise InputError("The mesh has devices of several processes; training takes those of one.")
    check_mesh(config, devices)
    split = split_sites(config, sites, devices)
    adapters = {
        name: {key: _matrix_spec(spec, *place, split) for key, place in spec.matrices(sites).items()}
        for name, spec in specs.items()
    }
    return StepLayout(config, devices, {module: _on_one_device(site) for module, site in split.items()}, adapters)


def beside(state: Any, placements: Placements) -> Any:
    """Where each array of a training state lies: moments beside their matrices, the rest on every device.

    Args:
      state: a `TrainState`, or its shapes.
      placements: of the matrices.
    """
    mesh = next(iter(next(iter(placements.values())).values())).mesh

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name, key = leaf_name(path[1]), leaf_name(path[-1])
        matrix = state.params[name].get(key)
        beside_matrix = matrix is not None and matrix.shape == leaf.shape
        return placements[name][key] if beside_matrix else NamedSharding(mesh, P())

    return jax.tree.map_with_path(place, state)


def _matrix_spec(spec: AdapterSpec, module: str, side: Side, sites: Mapping[str, Site]) -> P:
    site = sites[module]
    width = site.pools[SIDES.index(side)]
    assert isinstance(width, SplitWidth)
    experts = width.region_axes if spec.shape(module, side, site)[0] > 1 else ()
    if width.axes:
        return P(experts or None, None, width.axes)
    return P(experts) if experts else P()  # in jax's own form: with None at its end it would be another placement


def _on_one_device(site: Site) -> Site:
    assert site.split is not None
    of_in, of_out = site.split
    experts = site.num_experts // site.regions
    return Site(of_in.width // of_in.parts, of_out.width // of_out.parts, experts, site.layers)
