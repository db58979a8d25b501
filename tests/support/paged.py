"""Routed layers whose adapters lie in poisoned page pools, and their result by plain loops in float64."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer.moe import routed_experts
from pallas_kernels.ops import BASE_SLOT, LayerPages, LoRAPages
from pallas_kernels.routed_experts.weights import ExpertWeights

MODULES = ("gate", "up", "down")
LAYOUTS = ("per_expert", "fused", "shared_outer", "partial")
# And "shared_some": shared_outer, with no adapter on every other expert.
# The side that touches the hidden width has one matrix for all experts.
SHARED_OUTER = {("gate", "a"), ("up", "a"), ("down", "b")}


@dataclass(frozen=True)
class PagedSpec:
    """Sizes of a layer, and the ranks that its slots have in turn; slots take the layouts in turn too.

    Attributes:
      routing: `random`, `one` (all rows on one expert) or `half` (every other expert gets no row).
      empty_slots: that many of the slots hold no adapter, though rows ask for them.
    """

    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    slots: int = 4
    ranks: tuple[int, ...] = (4, 16, 40, 128)
    layouts: tuple[str, ...] = LAYOUTS
    dtype: str = "bfloat16"
    routing: str = "random"
    empty_slots: int = 0
    base_rows: float = 0.25


@dataclass(frozen=True)
class PagedLayer:
    """A drawn layer. `matrices[module, slot, expert]` is (A `[R, in]`, B `[out, R]`, scale)."""

    spec: PagedSpec
    x: jax.Array
    gates: jax.Array
    chosen: jax.Array
    slots: jax.Array
    experts: ExpertWeights
    adapters: LayerPages
    matrices: dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray, float]]

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(self.spec.hidden, self.spec.width, self.spec.experts, self.spec.top_k)

    def function(self, implementation: str | None):
        """`f(slots, adapters) -> y`, jitted."""

        @jax.jit
        def run(x, gates, chosen, slots, experts, adapters):
            return routed_experts(x, gates, chosen, experts, self.config, adapters, slots, implementation)

        def call(slots: jax.Array, adapters: LayerPages | None) -> jax.Array:
            return run(self.x, self.gates, self.chosen, slots, self.experts, adapters)

        return call

    def expected(self, tokens: np.ndarray) -> np.ndarray:
        """Rows of the given tokens, in float64."""
        x = wide(self.x)
        chosen, slots, gates = (np.asarray(v) for v in (self.chosen, self.slots, self.gates))
        out = np.zeros((len(tokens), self.spec.hidden))
        for row, t in enumerate(tokens):
            for k in range(self.spec.top_k):
                e, s = int(chosen[t, k]), int(slots[t])
                gate, up = (self._linear(x[t], module, s, e) for module in ("gate", "up"))
                out[row] += gates[t, k] * self._linear(gate / (1 + np.exp(-gate)) * up, "down", s, e)
        return out

    def _linear(self, row: np.ndarray, module: str, slot: int, expert: int) -> np.ndarray:
        y = wide(getattr(self.experts, module)[expert]) @ row
        if (module, slot, expert) in self.matrices:
            a, b, scale = self.matrices[module, slot, expert]
            y = y + scale * (b @ (a @ row))
        return y


def wide(values: jax.Array) -> np.ndarray:
    return np.asarray(values.astype(jnp.float32), np.float64)


def draw_layer(spec: PagedSpec, rng: np.random.Generator) -> PagedLayer:
    e, d, f = spec.experts, spec.hidden, spec.width

    def weights(*shape: int) -> jax.Array:
        key = jax.random.key(int(rng.integers(2**31)))
        return (shape[-1] ** -0.5 * jax.random.normal(key, shape, spec.dtype)).astype(spec.dtype)

    slots = rng.integers(0, spec.slots, spec.tokens)
    slots = np.where(rng.random(spec.tokens) < spec.base_rows, BASE_SLOT, slots).astype(np.int32)
    adapters, matrices = draw_adapters(spec, rng)
    return PagedLayer(
        spec,
        jnp.asarray(rng.normal(size=(spec.tokens, d)), spec.dtype),
        jnp.asarray(rng.dirichlet(np.ones(spec.top_k), spec.tokens), jnp.float32),
        jnp.asarray(draw_routing(spec, rng), jnp.int32),
        jnp.asarray(slots),
        ExpertWeights(weights(e, f, d), weights(e, f, d), weights(e, d, f)),
        adapters,
        matrices,
    )


def draw_routing(spec: PagedSpec, rng: np.random.Generator) -> np.ndarray:
    allowed = np.arange(spec.experts)[:: 2 if spec.routing == "half" else 1]
    if spec.routing == "one":
        # A router never picks an expert twice; this is the worst that a caller may hand in.
        return np.full((spec.tokens, spec.top_k), spec.experts - 1)
    return np.stack([rng.permutation(allowed)[: spec.top_k] for _ in range(spec.tokens)])


def draw_adapters(spec: PagedSpec, rng: np.random.Generator):
    """Pages of two pools, one a width, with a NaN page between any two matrices; and the matrices themselves."""
    pools: dict[int, list[np.ndarray]] = {spec.hidden: [], spec.width: []}
    for width, pages in pools.items():
        pages.append(np.zeros((1, 16, width), np.float32))
    tables = {m: np.zeros((spec.slots, spec.experts, 4), np.int32) for m in MODULES}
    scales = {m: rng.uniform(0.5, 2, (spec.slots, spec.experts)).astype(np.float32) for m in MODULES}
    matrices = {}

    def add(width: int, matrix: np.ndarray) -> int:
        """Pages of a matrix `[R, width]`; returns the first."""
        pages = pools[width]
        count = -(-matrix.shape[0] // 16)
        padded = np.zeros((count * 16, width), np.float32)
        padded[: matrix.shape[0]] = matrix
        pages.append(np.full((1, 16, width), np.nan, np.float32))
        first = sum(len(p) for p in pages)
        pages.append(padded.reshape(count, 16, width))
        return first

    for slot in range(spec.slots - spec.empty_slots):
        rank, layout = spec.ranks[slot % len(spec.ranks)], spec.layouts[slot % len(spec.layouts)]
        made: dict[tuple, tuple[int, np.ndarray]] = {}
        for module in MODULES:
            in_width, out_width = (spec.width, spec.hidden) if module == "down" else (spec.hidden, spec.width)
            if layout == "fused" and module != "down":
                scales[module][slot] = scales["gate"][slot]
            for expert in range(spec.experts):
                if layout == "partial" and (module != "up" or expert % 2):
                    continue
                if layout == "shared_some" and expert % 2:
                    continue
                sides = {}
                for side, width, scale in (("a", in_width, in_width**-0.5), ("b", out_width, rank**-0.5)):
                    shared = layout in ("shared_outer", "shared_some") and (module, side) in SHARED_OUTER
                    alias = layout == "fused" and module == "up" and side == "a"
                    key = ("gate" if alias else module, side, -1 if shared else expert)
                    if key not in made:
                        matrix = wide(jnp.asarray(scale * rng.normal(size=(rank, width)), spec.dtype))
                        made[key] = add(width, matrix), matrix
                    sides[side] = made[key]
                tables[module][slot, expert] = sides["a"][0], sides["b"][0], -(-rank // 16), rank
                factor = float(scales[module][slot, expert])
                matrices[module, slot, expert] = sides["a"][1], sides["b"][1].T, factor
    arrays = {width: jnp.asarray(np.concatenate(pages), spec.dtype) for width, pages in pools.items()}
    adapters = {}
    for module in MODULES:
        a, b = (spec.width, spec.hidden) if module == "down" else (spec.hidden, spec.width)
        adapters[module] = LoRAPages(
            arrays[a], arrays[b], jnp.asarray(tables[module]), jnp.asarray(scales[module]), max(spec.ranks)
        )
    return LayerPages.from_modules(adapters), matrices


def replicated(layer: PagedLayer, slot: int) -> PagedLayer:
    """The same layer with that slot's shared and aliased pages copied for each expert and module."""
    adapters = {}
    for module in layer.adapters.modules:
        pages = layer.adapters[module]
        table = np.array(pages.table)
        pools = {"a": [np.asarray(pages.a)], "b": [np.asarray(pages.b)]}
        for column, side in enumerate(("a", "b")):
            for expert in range(table.shape[1]):
                first, count = table[slot, expert, column], table[slot, expert, 2]
                table[slot, expert, column] = sum(len(p) for p in pools[side])
                pools[side].append(pools[side][0][first : first + count])
        adapters[module] = replace(
            pages,
            a=jnp.asarray(np.concatenate(pools["a"])),
            b=jnp.asarray(np.concatenate(pools["b"])),
            table=jnp.asarray(table),
        )
    return replace(layer, adapters=LayerPages.from_modules(adapters))


def assert_base_rows_exact_and_mixed_equals_solo(layer: PagedLayer, implementation: str, most_slots: int = 8) -> None:
    """Contracts 1 and 2 of a layer, bit for bit.

    Args:
      layer: the layer.
      implementation: the backend that runs it.
      most_slots: so many of its slots are run alone.
    """
    run = layer.function(implementation)
    mixed, base = run(layer.slots, layer.adapters), run(layer.slots, None)
    nobody = layer.slots < 0
    assert bool((mixed[nobody] == base[nobody]).all()), "base rows changed"
    for slot in np.unique(np.asarray(layer.slots)[~np.asarray(nobody)])[:most_slots]:
        own = layer.slots == slot
        solo = run(jnp.where(own, slot, BASE_SLOT), layer.adapters)
        assert bool((solo[own] == mixed[own]).all()), f"mixed differs from solo in slot {slot}"
        assert bool((solo[~own] == base[~own]).all()), f"slot {slot} reaches other rows"


def assert_wrong_slots_are_base_rows(layer: PagedLayer, implementation: str) -> None:
    """A slot out of range has no adapter, bit for bit."""
    run = layer.function(implementation)
    base = run(layer.slots, None)
    for wrong in (layer.spec.slots, 10**9, -7):
        assert bool((run(jnp.full_like(layer.slots, wrong), layer.adapters) == base).all())
