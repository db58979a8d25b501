"""What a bank asks of an adapter, whatever its files say: it fits the sites and the largest rank, and is finite."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from jax_moe_lora.adapters.formats.adapter_file import OUTSIDE
from jax_moe_lora.adapters.formats.names import OUTER_PATHS
from jax_moe_lora.adapters.lora import REPLACEABLE, LoRAAdapter, LoRAWeights, Site, memory_of
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.sizes import format_bytes

NO_SITE = "the model has no such projection, or was loaded without room for it (adapter_targets)"
MAKE_ROOM = "load the model with a larger max_replacements"
_PIECE_ROWS = 4096
NO_VOCABULARY = "the model was loaded without room for it: load it with adapter_targets='all'"


@dataclass(frozen=True)
class Violation:
    """One thing that keeps a projection's weights from being served.

    Attributes:
      layer: the projection's.
      module: the projection.
      problem: a sentence.
      found: what is there, in few words.
      expected: what should be there, in few words.
    """

    layer: int
    module: str
    problem: str
    found: object
    expected: str


@dataclass(frozen=True)
class Room:
    """What whole matrices an adapter may bring in place of the model's embedding and head.

    Attributes:
      shape: V and D; None where there is no room.
      count: how many; None for any number.
    """

    shape: tuple[int, int] | None = None
    count: int | None = 0

    @classmethod
    def of_model(cls, sites: Mapping[str, Site]) -> "Room":
        """Room for what the model's own embedding and head are, where they are among the sites."""
        site = sites.get("embedding")
        return cls() if site is None else cls((site.in_width, site.out_width), None)


def check_adapter(
    adapter: LoRAAdapter, sites: Mapping[str, Site], max_rank: int, dtype: np.dtype, room: Room | None = None
) -> None:
    """Refuses an adapter that a bank cannot serve.

    Args:
      adapter: the adapter.
      sites: the bank's projections.
      max_rank: the largest rank that the bank takes.
      dtype: the bank's.
      room: for whole matrices; None takes what the sites say of the model's.

    Raises:
      AdapterFormatError: the first thing that is wrong.
    """
    if not adapter.weights and not adapter.replacements:
        raise AdapterFormatError(f"Adapter {adapter.name!r} holds no weights; expected at least one projection.")
    layout = f" ({adapter.layout})" if adapter.layout else ""
    for bad in violations(adapter, sites, max_rank, room):
        where = bad.module if bad.layer == OUTSIDE else f"layer {bad.layer}, {bad.module}"
        raise AdapterFormatError(f"Adapter {adapter.name!r}{layout}, {where}: {bad.problem}")
    seen: set[int] = set()
    for (layer, module), weights in adapter.weights.items():
        for side, matrices in (("A", weights.a), ("B", weights.b)):
            if id(matrices) not in seen and not all_finite(matrices, dtype):  # an alias, as gate and up have, is seen
                raise AdapterFormatError(
                    f"Adapter {adapter.name!r}{layout}, layer {layer}, {module}: {side} {not_finite(dtype)}."
                )
            seen.add(id(matrices))
    for module, matrix in adapter.replacements.items():
        if not all(all_finite(matrix[row : row + _PIECE_ROWS], dtype) for row in range(0, len(matrix), _PIECE_ROWS)):
            raise AdapterFormatError(f"Adapter {adapter.name!r}{layout}, {module}: it {not_finite(dtype)}.")


def violations(
    adapter: LoRAAdapter, sites: Mapping[str, Site], max_rank: int, room: Room | None = None
) -> Iterator[Violation]:
    """Everything that is wrong and can be seen without the values of the matrices.

    Args:
      adapter: the adapter.
      sites: the bank's projections.
      max_rank: the largest rank that the bank takes.
      room: as for `check_adapter`.
    """
    yield from _replacement_violations(adapter, Room.of_model(sites) if room is None else room)
    for (layer, module), weights in adapter.weights.items():
        tokens = module in OUTER_PATHS.values() and bool(adapter.source.get("trainable_token_indices"))
        for problem, found, expected in _problems(layer, module, weights, sites, max_rank, tokens):
            yield Violation(layer, module, problem, found, expected)


def _replacement_violations(adapter: LoRAAdapter, room: Room) -> Iterator[Violation]:
    """What keeps whole matrices from being served."""
    count = len({memory_of(matrix) for matrix in adapter.replacements.values()})
    for module, matrix in adapter.replacements.items():
        shape, bad = list(matrix.shape), Violation(OUTSIDE, module, "", module, f"one of {', '.join(REPLACEABLE)}")
        if module not in REPLACEABLE:
            yield replace(bad, problem=f"it is replaced as a whole; expected {' or '.join(REPLACEABLE)}.")
        elif any(named == module for _, named in adapter.weights):
            why = "it is replaced as a whole (modules_to_save) and has LoRA too; expected one of the two."
            yield replace(bad, problem=why, found="both", expected="one of the two")
        elif room.shape is None:
            size = format_bytes(matrix.nbytes)
            why = f"its whole matrix {shape} (modules_to_save) takes {size}, and there is no room for it: {MAKE_ROOM}."
            yield replace(bad, problem=why, found=size, expected="a model with max_replacements")
        elif matrix.shape != room.shape:
            why = f"its whole matrix has shape {shape}; expected {list(room.shape)}."
            yield replace(bad, problem=why, found=shape, expected=str(list(room.shape)))
        elif room.count is not None and count > room.count:
            why = f"it needs {count} whole matrices (modules_to_save) of {format_bytes(matrix.nbytes)} each"
            why += f", and the bank has room for {room.count}: {MAKE_ROOM}."
            yield replace(bad, problem=why, found=count, expected=f"at most {room.count}")


def _problems(
    layer: int, module: str, weights: LoRAWeights, sites: Mapping[str, Site], max_rank: int, tokens: bool
) -> Iterator[tuple[str, object, str]]:
    """(sentence, found, expected)"""
    site = sites.get(module)
    if site is None:
        expected = ", ".join(sorted(sites))
        why = NO_VOCABULARY if module in OUTER_PATHS.values() else NO_SITE
        yield f"{why}; it has {expected}.", module, expected
        return
    if layer not in site.layers:
        yield f"the model has no {module} in this layer.", f"layer {layer}", "a layer that has it"
        return
    experts, rank = site.num_experts, weights.a.shape[1] if weights.a.ndim == 3 else -1
    for side, widths in (("a", (rank, site.in_width)), ("b", (site.out_width, rank))):
        shape, expected = getattr(weights, side).shape, f"[{experts} or 1, {widths[0]}, {widths[1]}]"
        if len(shape) != 3 or shape[0] not in (1, experts) or shape[1:] != widths:
            yield f"{side.upper()} has shape {list(shape)}; expected {expected}.", list(shape), expected
            return
    ranks, scale = weights.ranks, weights.scale
    if ranks.shape != (experts,) or scale.shape != (experts,):
        found = f"{ranks.shape} and {scale.shape}"
        yield f"ranks and scale have shapes {found}; expected ({experts},).", found, f"({experts},)"
        return
    if ranks.min(initial=0) < 0 or weights.max_rank > rank:
        found = f"{ranks.min()} and {weights.max_rank}"
        yield f"ranks lie between {found}; expected 0 to {rank}.", found, f"0 to {rank}"
    if weights.max_rank > max_rank:
        problem = f"its rank is {weights.max_rank}; the bank takes at most {max_rank} (raise max_rank)."
        if tokens:
            problem += " Each trained token (trainable_token_indices) takes a rank."
        yield problem, f"rank {weights.max_rank}", f"at most {max_rank}"
    # All experts share both matrices, so they have one rank; only a missing expert (rank 0) can differ.
    if weights.a.shape[0] == weights.b.shape[0] == 1 and (several := np.unique(ranks[ranks > 0])).size > 1:
        problem = f"A and B are shared by all experts and their ranks are {several.tolist()}; expected one rank."
        yield problem, several.tolist(), "one rank"
    with np.errstate(over="ignore"):
        finite = np.isfinite(np.asarray(scale).astype(np.float32)).all()
    if not finite:
        yield "its scale is not finite in float32.", "a scale that is not finite", "a finite one"


def not_finite(dtype: np.dtype) -> str:
    """What an error says of weights that are not finite in this dtype."""
    return f"holds values that are not finite in {np.dtype(dtype).name}, which are never served"


def all_finite(values: np.ndarray, dtype: np.dtype) -> bool:
    """Whether every value is finite once it is cast.

    Args:
      values: the values.
      dtype: what they are cast to.
    """
    with np.errstate(over="ignore"):
        cast = values.astype(dtype, copy=False)
    if dtype.itemsize != 2:
        return bool(np.isfinite(cast).all())
    # numpy's isfinite is slow for 16 bits: an exponent of all ones, as infinity has, is infinite or NaN.
    infinity = np.array(np.inf, dtype).view(np.uint16)
    return bool(((cast.view(np.uint16) & infinity) != infinity).all())
