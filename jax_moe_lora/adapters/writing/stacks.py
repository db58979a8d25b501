"""The layouts with one stack of all experts a side: Tinker's, and TensorRT-LLM's with its sidecar."""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np

from jax_moe_lora.adapters.formats.names import TINKER_PARTS, TRTLLM_PARTS, AdapterNames
from jax_moe_lora.adapters.writing.draft import Draft, Even, Part, dense_part

TINKER_HEAD = "model.unembed_tokens"


def stack_targets(
    names: AdapterNames, module: str, num_experts: int, parts: Mapping[str, tuple[str, ...]]
) -> list[str]:
    """What a config calls a module below `model.layers.L.`.

    Args:
      names: what projections are called in adapter files.
      module: the projection.
      num_experts: 1 for a dense one; not used here.
      parts: last part of a path -> the modules that a stack holds.
    """
    part = next((part for part, modules in parts.items() if modules == (module,)), None)
    return [f"{names.experts_path}.{part}" if part else TINKER_HEAD if module == "head" else names.dense_path(module)]


tinker_targets = partial(stack_targets, parts=TINKER_PARTS)
trtllm_targets = partial(stack_targets, parts=TRTLLM_PARTS)


def tinker(draft: Draft) -> Iterator[Part]:
    """A `[E or 1, R, in]`, B `[E or 1, out, R]`: any side may be shared."""
    draft.separate()
    for even, target in _evens(draft, TINKER_PARTS):
        yield _stack(even, target)
    yield from _dense(draft, TINKER_PARTS)


def trtllm(draft: Draft) -> Iterator[Part]:
    """A `[E, R, in]`, B `[E, out, R]`: a side that the sidecar declares shared is E equal matrices."""
    draft.separate()
    declared = _declared(draft)
    for even, target in _evens(draft, TRTLLM_PARTS):
        count = draft.sites[even.module].num_experts
        even = draft.copies(even, [side for side in "ab" if side != declared.get(even.module)])
        a, b = (np.broadcast_to(matrices, (count, *matrices.shape[1:])) for matrices in (even.a, even.b))
        yield _stack(Even(even.layer, even.module, a, b, even.scale), target)
    yield from _dense(draft, TRTLLM_PARTS)


def trtllm_sidecar(draft: Draft) -> dict[str, object] | None:
    """`lora_layout.json`: the shared side of each module; None where nothing is shared."""
    part_of = {modules[0]: part for part, modules in TRTLLM_PARTS.items()}
    shared = {part_of[module]: {"shared_side": side.upper()} for module, side in sorted(_declared(draft).items())}
    return {"version": 1, "moe_shared_outer": shared} if shared else None


def _declared(draft: Draft) -> dict[str, str]:
    """Module -> the side that all its experts share in every layer; the sidecar has room for one."""
    sides: dict[str, set[str]] = {}
    for _, module, weights in draft.weights():
        if module in draft.names.experts.values():
            shared = {side for side in "ab" if len(getattr(weights, side)) < len(weights.ranks)}
            if (weights.scale != weights.scale[0]).any():  # folded into B, which is each expert's own then
                shared -= {"b"}
            sides[module] = sides.get(module, shared) & shared
    return {module: min(shared) for module, shared in sides.items() if shared}


def _evens(draft: Draft, parts: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[Even, str]]:
    stacked = {module for modules in parts.values() for module in modules}
    for layer, module, _ in draft.weights():
        even = draft.even(layer, module) if module in stacked else None
        if even is not None:
            yield even, stack_targets(draft.names, module, len(even.a), parts)[0]


def _stack(even: Even, target: str) -> Part:
    return Part(even.layer, even.module, target, target, False, even.a, even.b, even.rank, even.scale)


def _dense(draft: Draft, parts: Mapping[str, tuple[str, ...]]) -> Iterator[Part]:
    stacked = {module for modules in parts.values() for module in modules}
    for layer, module, weights in draft.weights():
        if module not in stacked:
            if module == "embedding" or (module == "head" and parts is TRTLLM_PARTS):
                raise draft.error(layer, module, "this layout has no name for it; PEFT's layouts do")
            path = TINKER_HEAD if module == "head" else draft.names.dense_path(module)
            yield dense_part(layer, module, weights, path)
