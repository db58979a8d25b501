"""The routed experts with LoRA adapters in plain torch and float32: the definition, written with another library.

Imports nothing of the package, so that a fault of the package cannot be in it too. Needs torch (the `parity` extra).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Adapter = Mapping[str, tuple[Any, Any, Any]]
"""Module (`gate`, `up` or `down`) -> A `[E or 1, R, in]`, B `[E or 1, out, R]`, and the scale of B A."""


def torch_reference(
    x: Any,
    chosen: Any,
    weights: Any,
    experts: Mapping[str, Any],
    adapters: Sequence[Adapter] = (),
    slots: Any = None,
    device: str = "cpu",
) -> torch.Tensor:
    """Applies each token's top-k SwiGLU experts, with the token's own adapter, and sums them by their router weights.

    With `lin(W, A, B; x) = x W[e]^T + scale (x A[e]^T) B[e]^T`, a token's result is the sum over its experts e of
    `weight * lin(down; silu(lin(gate; x)) * lin(up; x))`. Arrays may be of numpy, jax or torch.

    Args:
      x: `[T, D]`, a row per token.
      chosen: integers `[T, K]`, the top-k expert ids of each token; an id outside `0 .. E-1` is skipped.
      weights: `[T, K]`, the router's scores of these experts.
      experts: `gate` and `up` as `[E, F, D]`, `down` as `[E, D, F]`.
      adapters: the adapters in slots 0, 1, ...: each maps a module to its A, B and scale, a number or one per expert. A
        side whose leading axis is 1 is shared by all experts.
      slots: integers `[T]`, the adapter of each token; -1 for none. May be left out where there are no adapters.
      device: where torch computes.

    Returns:
      float32 `[T, D]`, on the device.

    Raises:
      ImportError: torch is not installed.
      ValueError: adapters without slots, or for another module; shapes that disagree.
    """
    import torch

    x, weights = _float32(x, device), _float32(weights, device)
    chosen = torch.as_tensor(chosen if isinstance(chosen, torch.Tensor) else np.array(chosen)).to(device)
    if adapters and slots is None:
        raise ValueError(f"torch_reference got {len(adapters)} adapters and no slots; give the slot of each token.")
    slot_of = torch.as_tensor([-1] * len(x) if slots is None else [int(slot) for slot in slots], device=device)
    _check_shapes(x, chosen, weights, slot_of)
    for adapter in adapters:
        _check_adapter(adapter, len(experts["gate"]))

    def linear(module: str, rows: torch.Tensor, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        y = rows @ _float32(experts[module][expert], device).T
        for slot, adapter in enumerate(adapters):
            if module in adapter:
                uses_slot = slot_of[tokens] == slot
                y[uses_slot] += torch_delta(rows[uses_slot], *adapter[module], expert)
        return y

    y = torch.zeros_like(x)
    with _without_tf32():
        for expert in range(len(experts["gate"])):
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (linear(module, x[tokens], tokens, expert) for module in ("gate", "up"))
            down = linear("down", torch.nn.functional.silu(gate) * up, tokens, expert)
            y.index_add_(0, tokens, weights[tokens, place, None] * down)
    return y


def torch_delta(rows: Any, a: Any, b: Any, scale: Any, expert: int) -> torch.Tensor:
    """What an adapter adds to one projection of one expert: `scale (x A[e]^T) B[e]^T`.

    Args:
      rows: `[N, in]`, the x of the projection.
      a: `[E or 1, R, in]`.
      b: `[E or 1, out, R]`.
      scale: a number, or `[E]`.
      expert: e.

    Returns:
      float32 `[N, out]`, on the device of `rows`.
    """
    rows = _float32(rows)
    a, b = (_float32(side[expert if len(side) > 1 else 0], rows.device) for side in (a, b))
    return float(scale[expert] if np.ndim(scale) else scale) * ((rows @ a.T) @ b.T)


def _check_shapes(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> None:
    if chosen.shape != weights.shape or chosen.shape[:1] != x.shape[:1] or slots.shape != x.shape[:1]:
        shapes = f"x {[*x.shape]}, chosen {[*chosen.shape]}, weights {[*weights.shape]}, slots {[*slots.shape]}"
        raise ValueError(f"torch_reference got {shapes}; expected [T, D], [T, K], [T, K] and [T].")


def _check_adapter(adapter: Adapter, experts: int) -> None:
    for module, (a, b, _) in adapter.items():
        if module not in ("gate", "up", "down"):
            raise ValueError(f"An adapter has the module {module!r}; expected some of gate, up and down.")
        if {len(a), len(b)} - {1, experts}:
            raise ValueError(
                f"A and B of {module} have {len(a)} and {len(b)} matrices; expected 1 or {experts} of each."
            )


def _float32(values: Any, device: Any = None) -> torch.Tensor:
    import torch

    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values, np.float32))
    return tensor.detach().to(device, torch.float32)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """float32 as float32 on a GPU too, whatever the caller has set."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
