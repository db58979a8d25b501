"""The two layouts of PEFT: experts as 3-D parameters, which transformers 5 has, and as 2-D modules, of transformers 4.

Source of the conventions: peft 0.21, `tuners/lora/layer.py` (ParamWrapper), `utils/transformers_weight_conversion.py`.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.adapters.writing.draft import Draft, Even, Part, dense_part


def parameter_targets(names: AdapterNames, module: str, num_experts: int) -> list[str]:
    """What a config calls a module below `model.layers.L.` where experts are 3-D parameters.

    The router is a bare parameter in transformers 5. A dense MLP or a shared expert, whose last part is also one of an
    expert's, goes by its parameter too: by their module names PEFT would take them for the experts.

    Args:
      names: what projections are called in adapter files.
      module: the projection.
      num_experts: 1 for a dense one; not used here.
    """
    if module in names.experts.values():
        return [f"{names.experts_path}.{'down_proj' if module == 'down' else 'gate_up_proj'}"]
    path = names.dense_path(module)
    return [f"{path}.weight"] if module == "router" or path.rpartition(".")[2] in names.experts else [path]


def parameters(draft: Draft) -> Iterator[Part]:
    """A `[E*R, in]`, expert-major; B `[out, R*E]`, rank-major and expert-minor; gate and up have one A."""
    names = draft.names
    for layer in sorted({layer for layer, _ in draft.adapter.weights}):
        gate_up, down = _fused(draft, layer), draft.even(layer, "down")
        if gate_up is not None:  # peft wraps down_proj around it
            path = f"{names.experts_path}.base_layer" if down is not None else names.experts_path
            yield _parameter(draft, gate_up, "gate", path)
        if down is not None:
            yield _parameter(draft, draft.copies(down), "down", names.experts_path)
    for layer, module, weights in draft.weights():
        if module not in names.experts.values():
            path, (target,) = names.dense_path(module), parameter_targets(names, module, 1)
            yield dense_part(layer, module, weights, path, parameter=target != path)


def _parameter(draft: Draft, even: Even, module: str, path: str) -> Part:
    (target,) = parameter_targets(draft.names, module, len(even.a))
    a = even.a.reshape(-1, even.a.shape[2])
    b = even.b.transpose(1, 2, 0).reshape(even.b.shape[1], -1)
    return Part(even.layer, even.module, path, target, True, a, b, even.rank, even.scale)


def _fused(draft: Draft, layer: int) -> Even | None:
    """Gate and up as one projection: over one A, or as peft fuses two: ranks side by side, and a block-diagonal B."""
    gate, up = draft.even(layer, "gate"), draft.even(layer, "up")
    if gate is None or up is None:
        return _with_zero_half(draft, gate, up)
    scale = max(gate.scale, up.scale, key=abs)
    gate, up = _with_scale(draft, gate, scale), _with_scale(draft, up, scale)
    one_a = gate.a.dtype == up.a.dtype and np.array_equal(gate.a, up.a)
    gate, up = draft.copies(gate), draft.copies(up)
    if one_a:
        return replace(gate, module="gate and up", b=draft.names.fuse_gate_and_up(*_alike(gate.b, up.b)))
    draft.note(f"gate and up have different A, and were written as one projection of rank {gate.rank} + {up.rank}.")
    b_gate, b_up = _alike(gate.b, up.b)
    b_gate, b_up = np.pad(b_gate, ((0, 0), (0, 0), (0, up.rank))), np.pad(b_up, ((0, 0), (0, 0), (gate.rank, 0)))
    a = np.concatenate(_alike(gate.a, up.a), axis=1)
    return Even(layer, "gate and up", a, draft.names.fuse_gate_and_up(b_gate, b_up), scale)


def _with_scale(draft: Draft, even: Even, scale: float) -> Even:
    if even.scale == scale:
        return even
    return replace(even, b=draft.folded(even.layer, even.module, even.b, scale, even.scale / scale), scale=scale)


def _with_zero_half(draft: Draft, gate: Even | None, up: Even | None) -> Even | None:
    present = gate or up
    if present is None:
        return None
    draft.note(f"{present.module} stands alone, and was written as gate and up whose other half of B is zero.")
    present = draft.copies(present)
    zero = np.zeros_like(present.b)
    halves = (present.b, zero) if gate is not None else (zero, present.b)
    return replace(present, b=draft.names.fuse_gate_and_up(*halves))


def _alike(one: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in one dtype: the one that they have, or float32, which holds both half precisions."""
    if one.dtype == other.dtype:
        return one, other
    return one.astype(np.float32), other.astype(np.float32)


def module_targets(names: AdapterNames, module: str, num_experts: int) -> list[str]:
    """What a config calls a module below `model.layers.L.` where each expert has modules: one name per expert.

    Args:
      names: what projections are called in adapter files.
      module: the projection.
      num_experts: 1 for a dense one.
    """
    part = next((part for part, named in names.experts.items() if named == module), None)
    if part is None:
        return [names.dense_path(module, in_checkpoints=True)]
    return [f"{names.per_expert_path or names.experts_path}.{expert}.{part}" for expert in range(num_experts)]


def modules(draft: Draft) -> Iterator[Part]:
    """A `[R, in]` and B `[out, R]` for each expert that the adapter has, each with its rank and scale."""
    draft.separate()
    for layer, module, weights in draft.weights():
        targets = module_targets(draft.names, module, len(weights.ranks))
        if module not in draft.names.experts.values():
            yield dense_part(layer, module, weights, targets[0])
            continue
        whole = draft.copies(Even(layer, module, weights.a, weights.b, scale=np.nan))  # each expert has its own
        for expert in np.flatnonzero(weights.ranks):
            rank, path = int(weights.ranks[expert]), targets[expert]
            a, b = whole.a[expert, :rank], whole.b[expert, :, :rank]
            yield Part(layer, module, path, path, False, a, b, rank, float(weights.scale[expert]))
