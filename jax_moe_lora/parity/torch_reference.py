"""The routed experts with LoRA adapters in plain torch, float32, token by token: a definition by another library.

Imports nothing of the package, so that a fault of the package cannot be in it too. Needs torch (the `parity` extra).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

Adapter = Mapping[str, tuple[Any, Any, float]]
"""Module (`gate`, `up` or `down`) -> A `[E or 1, R, in]`, B `[E or 1, out, R]` and the scale of their product."""


def routed_experts(
    x: Any,
    weights: Any,
    chosen: Any,
    experts: Mapping[str, Any],
    adapters: Sequence[Adapter | None] | None = None,
) -> torch.Tensor:
    """Applies each token's top-k SwiGLU experts, with the token's own adapter, and sums them by their router weights.

    With `lin(W, A, B; x) = x W[e]^T + scale (x A[e]^T) B[e]^T`, a token's result is the sum over its experts e of
    `weight * lin(down; silu(lin(gate; x)) * lin(up; x))`. All arrays may be numpy's or torch's.

    Args:
      x: `[T, D]`, a row per token.
      weights: `[T, K]`, the router weights of a token's experts.
      chosen: integers `[T, K]`, a token's experts.
      experts: `gate` and `up` as `[E, F, D]`, `down` as `[E, D, F]`.
      adapters: an adapter per token, None for a base row; None serves the base model alone. A side whose leading axis
        is 1 is shared by all experts.

    Returns:
      float32 `[T, D]`.

    Raises:
      ImportError: torch is not installed.
    """
    import torch

    def float32(values: Any) -> torch.Tensor:
        if isinstance(values, torch.Tensor):
            return values.to(torch.float32)
        return torch.from_numpy(np.array(values, np.float32))

    def linear(row: torch.Tensor, module: str, expert: int, adapter: Adapter | None) -> torch.Tensor:
        y = row @ float32(experts[module][expert]).T
        if adapter is None or module not in adapter:
            return y
        a, b, scale = adapter[module]
        a, b = (float32(side[expert if len(side) > 1 else 0]) for side in (a, b))
        return y + scale * ((row @ a.T) @ b.T)

    x, weights = float32(x), float32(weights)
    y = torch.zeros_like(x)
    for token, row in enumerate(x):
        adapter = None if adapters is None else adapters[token]
        for weight, expert in zip(weights[token], map(int, chosen[token]), strict=True):
            hidden = torch.nn.functional.silu(linear(row, "gate", expert, adapter)) * linear(row, "up", expert, adapter)
            y[token] += weight * linear(hidden, "down", expert, adapter)
    return y
