"""Pages of LoRA matrices, the tables that find them, and one layer's view of all its adapters."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.constants import RANK_PAGE
from pallas_kernels.pytrees import pytree

__all__ = ["NO_ADAPTERS", "RANK_PAGE", "LayerPages", "LoRAPages", "Place"]


@pytree
@dataclass(frozen=True)
class LoRAPages:
    """The adapters of one projection in one layer, for all slots.

    A page holds 16 ranks of one A or one B; page 0 is all zeros. A matrix of rank R is ceil(R / 16) pages in a row,
    its last page filled up with zeros. All experts of a shared matrix have the same first page.

    Attributes:
      a: `[N_A, 16, in]`, pages of A.
      b: `[N_B, 16, out]`, pages of B, transposed so that ranks are rows.
      table: int32 `[S, E, 4]`: first page of A, first page of B, number of pages, rank. All zero: no adapter.
      scale: float32 `[S, E]`, the factor on the update.
      max_rank: static: no adapter here has a larger rank.
    """

    a: Float[Array, "N_A 16 in"]
    b: Float[Array, "N_B 16 out"]
    table: Int[Array, "S E 4"]
    scale: Float[Array, "S E"]
    max_rank: int = field(metadata={"static": True})

    def transposed(self) -> "LoRAPages":
        """The adapters of the transposed projection: `(B @ A).T = A.T @ B.T`, so A and B change places."""
        return replace(self, a=self.b, b=self.a, table=_swapped(self.table))


@dataclass(frozen=True)
class Place:
    """Where a module's pages lie.

    Attributes:
      module: name of the projection.
      a: name of the pool that holds its pages of A; empty where the module has no adapters.
      b: name of the pool that holds its pages of B; empty where the module has no adapters.
    """

    module: str
    a: str = ""
    b: str = ""


@pytree
@dataclass(frozen=True)
class LayerPages:
    """The adapters of several projections of one layer, for all slots.

    Which modules share a pool is static: it decides how much work a call is (two projections whose pages of A lie in
    one pool are read in one pass), so it must not depend on how the pages reach a jitted function.

    Attributes:
      pools: name -> `[N, 16, width]`, pages of A and of B.
      tables: module -> int32 `[S, E, 4]`, as in `LoRAPages.table`.
      scales: module -> float32 `[S, E]`.
      places: static: each module and its pools, in the order of the weights that they belong to.
      max_rank: static: no adapter here has a larger rank.
    """

    pools: dict[str, Float[Array, "_pages 16 _width"]]
    tables: dict[str, Int[Array, "S _E 4"]]
    scales: dict[str, Float[Array, "S _E"]]
    places: tuple[Place, ...] = field(metadata={"static": True})
    max_rank: int = field(metadata={"static": True})

    @classmethod
    def from_modules(cls, modules: Mapping[str, LoRAPages]) -> "LayerPages":
        """The pages of several modules; arrays that are the same object become one pool.

        Call it outside of `jit`, where two arguments are never the same object.
        """
        names: dict[int, str] = {}
        pools: dict[str, Array] = {}
        for module, pages in modules.items():
            for side, pool in (("a", pages.a), ("b", pages.b)):
                name = names.setdefault(id(pool), f"{module}.{side}")
                pools[name] = pool
        return cls(
            pools,
            {module: pages.table for module, pages in modules.items()},
            {module: pages.scale for module, pages in modules.items()},
            tuple(Place(module, names[id(pages.a)], names[id(pages.b)]) for module, pages in modules.items()),
            max((pages.max_rank for pages in modules.values()), default=0),
        )

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that have adapters."""
        return tuple(place.module for place in self.places if place.a)

    @property
    def num_slots(self) -> int:
        """S; 0 where no module has adapters."""
        return next((scale.shape[0] for scale in self.scales.values()), 0)

    @property
    def projections(self) -> tuple[LoRAPages | None, ...]:
        """The pages of each place, None for a module without adapters."""
        return tuple(self.get(place.module) for place in self.places)

    @property
    def a_in_one_pool(self) -> bool:
        """Whether all modules have their pages of A in one pool, so that one page can serve several."""
        return len({place.a for place in self.places}) == 1

    def get(self, module: str) -> LoRAPages | None:
        """A module's pages, or None where it has no adapters."""
        place = next((place for place in self.places if place.module == module and place.a), None)
        if place is None:
            return None
        return LoRAPages(
            self.pools[place.a], self.pools[place.b], self.tables[module], self.scales[module], self.max_rank
        )

    def __getitem__(self, module: str) -> LoRAPages:
        if (pages := self.get(module)) is None:
            raise KeyError(module)
        return pages

    def __contains__(self, module: object) -> bool:
        return module in self.modules

    def select(self, *modules: str) -> "LayerPages":
        """These modules alone, in this order; one without adapters keeps a place without pools."""
        by_module = {place.module: place for place in self.places}
        return self._at(tuple(by_module.get(module, Place(module)) for module in modules))

    def only(self, modules: Collection[str]) -> "LayerPages":
        """The adapters of these modules; the others keep a place without pools."""
        return self._at(tuple(place if place.module in modules else Place(place.module) for place in self.places))

    def pad_with_empty_pages(self) -> "LayerPages":
        """The same adapters; a module without any gets the pools of the first one that has some, and no slot in use."""
        first = next(place for place in self.places if place.a)
        missing = [place.module for place in self.places if not place.a]
        return replace(
            self,
            tables=self.tables | {module: jnp.zeros_like(self.tables[first.module]) for module in missing},
            scales=self.scales | {module: jnp.zeros_like(self.scales[first.module]) for module in missing},
            places=tuple(place if place.a else Place(place.module, first.a, first.b) for place in self.places),
        )

    def transposed(self) -> "LayerPages":
        """The adapters of the transposed projections: A and B change places."""
        return replace(
            self,
            tables={module: _swapped(table) for module, table in self.tables.items()},
            places=tuple(Place(place.module, place.b, place.a) for place in self.places),
        )

    def astype(self, dtype: jax.typing.DTypeLike) -> "LayerPages":
        """The same adapters with pages of `dtype`."""
        return replace(self, pools={name: pool.astype(dtype) for name, pool in self.pools.items()})

    def _at(self, places: tuple[Place, ...]) -> "LayerPages":
        modules = [place.module for place in places if place.a]
        return LayerPages(
            {pool: self.pools[pool] for place in places for pool in (place.a, place.b) if pool},
            {module: self.tables[module] for module in modules},
            {module: self.scales[module] for module in modules},
            places,
            self.max_rank,
        )


def _swapped(table: Int[Array, "S E 4"]) -> Int[Array, "S E 4"]:
    return table[..., jnp.array([1, 0, 2, 3])]


NO_ADAPTERS = LayerPages({}, {}, {}, (), 0)
