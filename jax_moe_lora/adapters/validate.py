"""Checks of one adapter against a model's sites, before anything is changed."""

from collections.abc import Iterator, Mapping

import numpy as np

from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, Site
from jax_moe_lora.errors import AdapterFormatError


def check_adapter(adapter: LoRAAdapter, sites: Mapping[str, Site], max_rank: int, dtype: np.dtype) -> None:
    """Raises AdapterFormatError for the first thing that keeps the adapter from being served by a bank."""
    if not adapter.weights:
        raise AdapterFormatError(f"Adapter {adapter.name!r} holds no weights; expected at least one projection.")
    seen: set[int] = set()
    for (layer, module), weights in adapter.weights.items():
        for problem in _problems(layer, module, weights, sites, max_rank, dtype, seen):
            layout = f" ({adapter.layout})" if adapter.layout else ""
            raise AdapterFormatError(f"Adapter {adapter.name!r}{layout}, layer {layer}, {module}: {problem}")


def _problems(
    layer: int,
    module: str,
    weights: LoRAWeights,
    sites: Mapping[str, Site],
    max_rank: int,
    dtype: np.dtype,
    seen: set[int],
) -> Iterator[str]:
    site = sites.get(module)
    if site is None:
        yield f"the model has no such projection; it has {', '.join(sorted(sites))}."
        return
    if layer not in site.layers:
        yield f"the model has no {module} in this layer."
        return
    experts, rank = site.num_experts, weights.a.shape[1] if weights.a.ndim == 3 else -1
    for side, expected in (("a", (rank, site.in_width)), ("b", (site.out_width, rank))):
        shape = getattr(weights, side).shape
        if len(shape) != 3 or shape[0] not in (1, experts) or shape[1:] != expected:
            yield f"{side.upper()} has shape {list(shape)}; expected [{experts} or 1, {expected[0]}, {expected[1]}]."
            return
    if weights.ranks.shape != (experts,) or weights.scale.shape != (experts,):
        yield f"ranks and scale have shapes {weights.ranks.shape} and {weights.scale.shape}; expected ({experts},)."
        return
    if weights.ranks.min(initial=0) < 0 or weights.max_rank > rank:
        yield f"ranks lie between {weights.ranks.min()} and {weights.max_rank}; expected 0 to {rank}."
    if weights.max_rank > max_rank:
        yield f"its rank is {weights.max_rank}; the bank takes at most {max_rank} (raise max_rank)."
    # Nothing is each expert's own here, so no rank can be either; only a missing expert (rank 0) can be told apart.
    if weights.a.shape[0] == weights.b.shape[0] == 1 and (own := np.unique(weights.ranks[weights.ranks > 0])).size > 1:
        yield f"A and B are shared by all experts and their ranks are {own.tolist()}; expected one rank."
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.asarray(weights.scale).astype(np.float32)).all()
    if not finite:
        yield "its scale is not finite in float32."
    for side in ("a", "b"):
        matrices = getattr(weights, side)
        if id(matrices) in seen:  # an alias, as gate and up have
            continue
        seen.add(id(matrices))
        if not _all_finite(matrices, dtype):
            yield f"{side.upper()} holds values that are not finite in {np.dtype(dtype).name}, which are never served."


def _all_finite(values: np.ndarray, dtype: np.dtype) -> bool:
    """Whether every value is finite once it is of this dtype."""
    with np.errstate(over="ignore"):
        cast = values.astype(dtype, copy=False)
    if dtype.itemsize != 2:
        return bool(np.isfinite(cast).all())
    # numpy's isfinite is slow for 16 bits: an exponent of all ones, as infinity has, is infinite or no number.
    infinity = np.array(np.inf, dtype).view(np.uint16)
    return bool(((cast.view(np.uint16) & infinity) != infinity).all())
