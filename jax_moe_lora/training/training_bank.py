"""The adapter bank of a training step: pages of all adapters' parameters, made inside the step.

A decoder reads it as it reads an `AdapterBank`, and it is differentiable: its pages are the float32 parameters, padded
and concatenated. The specs alone decide where each page lies, so the tables are constants of the program.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.lora import SIDES, Side, Site
from jax_moe_lora.training.spec import AdapterSpec
from pallas_kernels.pages import NO_ADAPTERS, RANK_PAGE, LayerPages, Place
from pallas_kernels.pytrees import pytree


@pytree
@dataclass(frozen=True)
class TrainingBank:
    """Pages and tables of every layer. Make one with `training_bank`.

    Attributes:
      pools: for each layer, pool -> `[N, 16, width]`. The A matrices of gate and up are in one pool, so that a matrix
        that they share is one page. Every other side of a module has a pool to itself. Page 0 is zeros.
      tables: for each layer, module -> int32 `[S, E, 4]`, as in `LayerPages`.
      scales: for each layer, module -> float32 `[S, E]`.
      num_slots: S.
      max_rank: the largest rank of any adapter.
    """

    pools: tuple[dict[str, Float[Array, "_N 16 _width"]], ...]
    tables: tuple[dict[str, Int[Array, "S _E 4"]], ...]
    scales: tuple[dict[str, Float[Array, "S _E"]], ...]
    num_slots: int = field(metadata={"static": True})
    max_rank: int = field(metadata={"static": True})

    @property
    def replacements(self) -> None:
        """No whole matrix of embedding or head is trained."""
        return None

    def layer(self, layer: int) -> LayerPages:
        """The pages of one layer; there are none behind the last one, where embedding and head would have theirs."""
        if layer >= len(self.tables):
            return NO_ADAPTERS
        tables = self.tables[layer]
        places = tuple(Place(module, pool_of(module, "a"), pool_of(module, "b")) for module in tables)
        return LayerPages(self.pools[layer], tables, self.scales[layer], places, self.max_rank)


def training_bank(
    params: Mapping[str, Mapping[str, Array]],
    specs: Mapping[str, AdapterSpec],
    sites: Mapping[str, Site],
    num_layers: int,
) -> TrainingBank:
    """The bank of these adapters, in slots 0, 1, ... in the order of `specs`.

    Args:
      params: adapter -> its params, as `init_params` makes them.
      specs: adapter -> what it trains.
      sites: the model's.
      num_layers: L.
    """
    layers = [_layer(layer, params, specs, sites) for layer in range(num_layers)]
    pools, tables, scales = zip(*layers, strict=True)
    return TrainingBank(pools, tables, scales, len(specs), max(spec.max_rank for spec in specs.values()))


def pool_of(module: str, side: Side) -> str:
    """The name of the pool of a module's A or B."""
    return "gate_up.a" if side == "a" and module in ("gate", "up") else f"{module}.{side}"


def _layer(
    layer: int,
    params: Mapping[str, Mapping[str, Array]],
    specs: Mapping[str, AdapterSpec],
    sites: Mapping[str, Site],
) -> tuple[dict[str, Array], dict[str, Array], dict[str, Array]]:
    """The pools, tables and scales of one layer."""
    pools: dict[str, list[Array]] = {}
    first_pages: dict[tuple[int, str], int] = {}  # by (slot, matrix)
    tables: dict[str, np.ndarray] = {}
    scales: dict[str, np.ndarray] = {}
    for slot, (name, spec) in enumerate(specs.items()):
        for module in spec.targets:
            site, rank = sites[module], spec.rank_of(module)
            if layer not in site.layers:
                continue
            table = tables.setdefault(module, np.zeros((len(specs), site.num_experts, 4), np.int32))
            pages = -(-rank // RANK_PAGE)
            table[slot, :, 2:] = pages, rank
            scales.setdefault(module, np.zeros(table.shape[:2], np.float32))[slot] = spec.scale_of(module)
            for column, side in enumerate(SIDES):
                key = slot, spec.matrix(module, side)
                if key not in first_pages:
                    matrix_pages = _pages(params[name][f"{layer}.{key[1]}"])
                    pool = pools.setdefault(pool_of(module, side), [jnp.zeros_like(matrix_pages[:1])])
                    first_pages[key] = sum(map(len, pool))
                    pool.append(matrix_pages)
                shared = spec.shape(module, side, site)[0] == 1
                table[slot, :, column] = first_pages[key] + pages * np.arange(site.num_experts) * (not shared)
    return (
        {name: jnp.concatenate(pool) for name, pool in pools.items()},
        {module: jnp.asarray(table) for module, table in tables.items()},
        {module: jnp.asarray(scale) for module, scale in scales.items()},
    )


def _pages(rows: Float[Array, "E ranks width"]) -> Float[Array, "N 16 width"]:
    """The pages of one matrix per expert; the last page of each is padded with zeros."""
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % RANK_PAGE), (0, 0)))
    return rows.reshape(-1, RANK_PAGE, rows.shape[2])
