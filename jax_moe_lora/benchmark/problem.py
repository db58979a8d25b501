"""A routed layer with adapters for timing: random weights and pages on the device, routing drawn at random."""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jax_moe_lora.adapters.lora import EXPERT_MODULES
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.errors import InputError
from pallas_kernels.pages import NO_ADAPTERS, RANK_PAGE, LayerPages, Place
from pallas_kernels.routed_experts.weights import ExpertWeights
from pallas_kernels.specs import ADAPTERS, LAYERS, AdapterMix


@dataclass(frozen=True)
class Problem:
    """Inputs of `routed_experts`.

    Attributes:
      config: the layer's sizes.
      x: `[T, D]`, the tokens.
      weights: `[T, K]`, the router's weights.
      chosen: `[T, K]`, the chosen experts' ids.
      slots: `[T]`, each token's adapter slot; -1 for none.
      experts: the experts' weights.
      adapters: the layer's pages; None without adapters.
    """

    config: MoEConfig
    x: Float[Array, "T D"]
    weights: Float[Array, "T K"]
    chosen: Int[Array, "T K"]
    slots: Int[Array, "T"]
    experts: ExpertWeights
    adapters: LayerPages | None

    def with_adapters(self, name: str) -> "Problem":
        """The same weights with other adapters.

        Args:
          name: a set of adapters in `specs.ADAPTERS`.

        Returns:
          The new problem.

        Raises:
          InputError: no set has this name.
        """
        if name not in ADAPTERS:
            raise InputError(f"adapters are {name!r}; expected one of {', '.join(ADAPTERS)}.")
        spec, size = ADAPTERS[name], self.config
        made = _adapters(size.num_experts, size.hidden_size, size.expert_width, spec, self.x.dtype.name)
        return replace(self, adapters=made if spec.slots else None)

    def with_tokens(
        self, tokens: int, routing: str, spec: AdapterMix, slots: str = "uniform", seed: int = 0
    ) -> "Problem":
        """The same weights and adapters with other tokens.

        Args:
          tokens: T.
          routing: how experts are drawn, see `choose_experts`.
          spec: the adapters that the tokens may use.
          slots: how slots are drawn, see `choose_slots`.
          seed: of all that is drawn.

        Returns:
          The new problem.

        Raises:
          InputError: `routing` or `slots` is unknown.
        """
        drawn = draw(self.config.num_experts, self.config.top_k, tokens, routing, spec, slots, seed)
        x = jax.random.normal(jax.random.key(seed), (tokens, self.config.hidden_size), self.x.dtype)
        weights, chosen, of_token = (jnp.asarray(array) for array in (drawn.weights, drawn.chosen, drawn.slots))
        return replace(self, x=x, weights=weights, chosen=chosen, slots=of_token)

    @property
    def draw(self) -> "Draw":
        """What was drawn, on the host."""
        return Draw(*(np.asarray(array) for array in (self.chosen, self.slots, self.weights)))

    def moved_bytes(self) -> float:
        """Bytes of the weights and pages in use, each counted once; of quantised weights, values and scales."""
        size, width = self.x.dtype.itemsize, self.config.hidden_size + self.config.expert_width
        stacks = (self.experts.gate, self.experts.up, self.experts.down)
        moved = len(np.unique(self.chosen)) * sum(weight.nbytes // self.config.num_experts for weight in stacks)
        for table in self._tables():
            counts = table[..., 2]
            moved += sum(int(counts[s, e]) for s, e in self._pairs()) * RANK_PAGE * width * size
        return moved

    def flops(self) -> float:
        """Multiplications and additions that the tokens need, with ranks not rounded up to pages."""
        width = self.config.hidden_size + self.config.expert_width
        total = 6.0 * self.chosen.size * self.config.hidden_size * self.config.expert_width
        slots, chosen = np.asarray(self.slots), np.asarray(self.chosen)
        for table in self._tables():
            ranks = table[..., 3]
            ranks_of_pairs = np.where(slots[:, None] >= 0, ranks[slots[:, None], chosen], 0)
            total += 2.0 * int(ranks_of_pairs.sum()) * width
        return total

    def _tables(self) -> list[np.ndarray]:
        """The tables of all modules with adapters."""
        return [] if self.adapters is None else [np.asarray(table) for table in self.adapters.tables.values()]

    def _pairs(self) -> set[tuple[int, int]]:
        slots, chosen = np.asarray(self.slots), np.asarray(self.chosen)
        return {(int(s), int(e)) for s, row in zip(slots, chosen, strict=True) if s >= 0 for e in row}


def make_problem(shape: str, adapters: str = "none", dtype: str = "bfloat16") -> Problem:
    """Random weights and adapters of a named shape, without tokens; `with_tokens` draws these.

    Args:
      shape: a layer in `specs.LAYERS`.
      adapters: a set of adapters in `specs.ADAPTERS`.
      dtype: of weights, pages and tokens.

    Returns:
      The problem.

    Raises:
      InputError: a name is unknown.
    """
    if shape not in LAYERS:
        raise InputError(f"shape is {shape!r}; expected one of {', '.join(LAYERS)}.")
    spec = LAYERS[shape]
    e, d, f = spec.num_experts, spec.hidden_size, spec.expert_width
    config = MoEConfig(d, f, e, spec.top_k)
    keys = jax.random.split(jax.random.key(0), 3)
    experts = ExpertWeights(
        _normal(keys[0], (e, f, d), d**-0.5, dtype),
        _normal(keys[1], (e, f, d), d**-0.5, dtype),
        _normal(keys[2], (e, d, f), f**-0.5, dtype),
    )
    none: Any = jnp.zeros((0,), jnp.int32)
    x = jnp.zeros((0, d), dtype)
    return Problem(config, x, none, none, none, experts, None).with_adapters(adapters)


def _adapters(e: int, hidden: int, inner: int, lora: AdapterMix, dtype: str) -> LayerPages:
    """Per-expert adapters of the spec's ranks, in one pool a width, as a bank has them."""
    if not lora.slots:
        return NO_ADAPTERS
    widths = {"in": hidden, "out": inner}
    ranks = np.resize(np.asarray(lora.ranks, np.int32), lora.slots)
    counts = -(-ranks // RANK_PAGE)
    each = int(counts.sum()) * e
    # Which ranks of each page are in use, in the order in which the pages are handed out below.
    of_slot = [np.arange(count * RANK_PAGE) < rank for count, rank in zip(counts, ranks, strict=True)]
    marks = [np.zeros(RANK_PAGE, bool), *[np.tile(mark, e) for mark in of_slot] * len(EXPERT_MODULES)]
    in_use = np.concatenate(marks).reshape(-1, RANK_PAGE)
    pools = {}
    for key, (name, width) in enumerate(widths.items()):
        scale = width**-0.5 if name == "in" else float(ranks.mean()) ** -0.5
        pool = _normal(jax.random.key(10 + key), (1 + 3 * each, RANK_PAGE, width), scale, dtype)
        pools[name] = jnp.where(jnp.asarray(in_use)[:, :, None], pool, 0)
    within = (np.cumsum(counts) - counts)[:, None] * e + np.arange(e)[None] * counts[:, None]
    tables, scales, places = {}, {}, []
    for index, module in enumerate(EXPERT_MODULES):
        places.append(Place(module, *(("in", "out") if module != "down" else ("out", "in"))))
        table = np.zeros((lora.slots, e, 4), np.int32)
        table[..., 0] = table[..., 1] = 1 + index * each + within
        table[..., 2], table[..., 3] = counts[:, None], ranks[:, None]
        tables[module] = jnp.asarray(table)
        scales[module] = jnp.full((lora.slots, e), 0.5, jnp.float32)
    return LayerPages(pools, tables, scales, tuple(places), int(ranks.max()))


@dataclass(frozen=True)
class Draw:
    """Who goes where, the same for all engines of a cell.

    Attributes:
      chosen: int32 `[T, K]`, the experts of each token.
      slots: int32 `[T]`, its adapter slot; -1 for none.
      weights: float32 `[T, K]`, the router's weights.
    """

    chosen: np.ndarray
    slots: np.ndarray
    weights: np.ndarray

    @property
    def digest(self) -> str:
        """What two equal draws have in common."""
        arrays = (np.ascontiguousarray(array).tobytes() for array in (self.chosen, self.slots, self.weights))
        return hashlib.sha256(b"".join(arrays)).hexdigest()[:12]


def draw(experts: int, top_k: int, tokens: int, routing: str, spec: AdapterMix, slots: str, seed: int = 0) -> Draw:
    """Draws experts, weights and slots, on the host.

    Args:
      experts: E.
      top_k: K.
      tokens: T.
      routing: how experts are drawn, see `choose_experts`.
      spec: the adapters that the tokens may use.
      slots: how slots are drawn, see `choose_slots`.
      seed: of all that is drawn.

    Returns:
      The draw.

    Raises:
      InputError: `routing` or `slots` is unknown.
    """
    rng = np.random.default_rng(seed)
    chosen = choose_experts(routing, tokens, experts, top_k, rng)
    weights = rng.dirichlet(np.ones(top_k), tokens).astype(np.float32)
    return Draw(chosen, choose_slots(slots, tokens, spec, rng), weights)


def choose_experts(routing: str, tokens: int, experts: int, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Draws distinct experts for each token.

    Args:
      routing: `uniform`, `zipf` (exponent 1) or `quarter` (uniform over a quarter of the experts).
      tokens: T.
      experts: E.
      top_k: K.
      rng: the source of randomness.

    Returns:
      int32 `[T, K]`.

    Raises:
      InputError: `routing` is unknown.
    """
    weight = {"uniform": np.ones(experts), "zipf": 1 / np.arange(1, experts + 1), "quarter": np.zeros(experts)}
    if routing not in weight:
        raise InputError(f"routing is {routing!r}; expected one of {', '.join(weight)}.")
    weight["quarter"][: max(top_k, experts // 4)] = 1
    with np.errstate(divide="ignore"):
        scores = np.log(weight[routing])[None] + rng.gumbel(size=(tokens, experts))
    return np.argsort(-scores, axis=1)[:, :top_k].astype(np.int32)


def choose_slots(slots: str, tokens: int, spec: AdapterMix, rng: np.random.Generator) -> np.ndarray:
    """Draws a slot for each token.

    Args:
      slots: `uniform`, `one` (all adapted tokens use slot 0) or `half-base` (half of the tokens have no adapter).
      tokens: T.
      spec: the adapters, and their share of tokens without one.
      rng: the source of randomness.

    Returns:
      int32 `[T]`; -1 for no adapter.

    Raises:
      InputError: `slots` is unknown.
    """
    base_rows = {"uniform": spec.base_rows, "one": spec.base_rows, "half-base": max(spec.base_rows, 0.5)}
    if slots not in base_rows:
        raise InputError(f"slots are {slots!r}; expected one of {', '.join(base_rows)}.")
    drawn = rng.integers(0, max(spec.slots, 1), tokens)
    adapted = (rng.random(tokens) >= base_rows[slots]) & (spec.slots > 0)
    return np.where(adapted, 0 if slots == "one" else drawn, -1).astype(np.int32)


@partial(jax.jit, static_argnames=("shape", "scale", "dtype"))  # compiled once per shape, whatever the adapters
def _normal(key: jax.Array, shape: tuple[int, ...], scale: float, dtype: str) -> Array:
    return (scale * jax.random.normal(key, shape, dtype)).astype(dtype)
