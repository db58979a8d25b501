"""The layer in numpy, token by token: the definition that everything else is compared with.

Imports nothing of the package. Weights are `[E, out, in]`. An adapter is `{module: (A, B, scale)}` with
A `[E, R, in]` and B `[E, out, R]`; modules are `router` (E = 1), `gate`, `up` and `down`, and a leading axis of 1 is
shared by all experts. Biases are `{module: [E, out]}`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Adapter = Mapping[str, tuple[np.ndarray, np.ndarray, Any]]


def moe_lora(
    x: np.ndarray,
    router: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    adapters: Sequence[Adapter | None],
    *,
    top_k: int,
    router_kind: str = "softmax_topk",
    renormalize: bool = False,
    scaling: float = 1.0,
    router_bias: np.ndarray | None = None,
    groups: tuple[int, int, str] = (1, 1, "max"),
    activation: str = "silu",
    biases: Mapping[str, np.ndarray] | None = None,
    dtype: type = np.float32,
) -> np.ndarray:
    """Returns `y [T, D]`; `adapters[t]` is token t's adapter, or None.

    `groups` says how many groups of neighbours the experts form, of how many a token chooses, and what a group's score
    is: that of its best expert (`max`), or the sum of its two best (`top2_sum`).
    """
    weights = {"router": router[None], "gate": gate, "up": up, "down": down}
    weights = {name: np.asarray(w, dtype) for name, w in weights.items()}
    y: np.ndarray = np.zeros(x.shape, dtype)
    for t, adapter in enumerate(adapters):
        row = np.asarray(x[t], dtype)
        scores = _linear(row, "router", 0, weights, adapter, dtype)
        for p, e in _route(scores, top_k, router_kind, renormalize, scaling, router_bias, groups):
            b = {name: np.asarray(bias[e], dtype) for name, bias in (biases or {}).items()}
            g = _linear(row, "gate", e, weights, adapter, dtype) + b.get("gate", 0)
            u = _linear(row, "up", e, weights, adapter, dtype) + b.get("up", 0)
            hidden = GATED_UNITS[activation](g, u)
            y[t] += p * (_linear(hidden, "down", e, weights, adapter, dtype) + b.get("down", 0))
    return y


def _silu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    return gate / (1 + np.exp(-gate)) * up


def _gelu_tanh(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Hendrycks and Gimpel, arXiv:1606.08415, section 2: the approximation by tanh."""
    return 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up


def _clamped_swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Of gpt-oss."""
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


GATED_UNITS = {"silu": _silu, "gelu_tanh": _gelu_tanh, "clamped_swiglu": _clamped_swiglu}


def _linear(
    row: np.ndarray, module: str, expert: int, weights: Mapping[str, np.ndarray], adapter: Adapter | None, dtype: type
) -> np.ndarray:
    y = weights[module][expert] @ row
    if adapter is None or module not in adapter:
        return y
    a, b, scale = adapter[module]
    a_of_expert = np.asarray(a[expert if a.shape[0] > 1 else 0], dtype)
    b_of_expert = np.asarray(b[expert if b.shape[0] > 1 else 0], dtype)
    return y + dtype(scale) * (b_of_expert @ (a_of_expert @ row))


def _route(
    scores: np.ndarray,
    top_k: int,
    kind: str,
    renormalize: bool,
    scaling: float,
    bias: np.ndarray | None,
    groups: tuple[int, int, str],
) -> list[tuple[float, int]]:
    def softmax(values: np.ndarray) -> np.ndarray:
        exponentials = np.exp(values - values.max())
        return exponentials / exponentials.sum()

    if bias is not None and kind not in ("sigmoid_bias", "softmax_bias"):
        scores = scores + bias
    if kind == "softmax_topk":
        probabilities = softmax(scores)
        chosen = _choose(probabilities, top_k, groups)
        p = probabilities[chosen]
    elif kind == "topk_softmax":
        chosen = _choose(scores, top_k, groups)
        p = softmax(scores[chosen])
    elif kind == "sigmoid_bias":
        sigmoid = 1 / (1 + np.exp(-scores))
        chosen = _choose(sigmoid if bias is None else sigmoid + bias, top_k, groups)
        p = sigmoid[chosen]
    elif kind == "softmax_bias":
        probabilities = softmax(scores)
        chosen = _choose(probabilities if bias is None else probabilities + bias, top_k, groups)
        p = probabilities[chosen]
    elif kind == "sparsemixer":
        chosen, p = _sparse_mixer(scores)
    else:
        raise ValueError(f"unknown router kind {kind!r}")
    if renormalize:
        p = p / p.sum()
    return [(float(weight) * scaling, int(e)) for weight, e in zip(p, chosen, strict=True)]


def _choose(values: np.ndarray, top_k: int, groups: tuple[int, int, str]) -> np.ndarray:
    """The experts with the largest values, among those of the best groups."""
    num_groups, top_groups, score = groups
    size = len(values) // num_groups
    if top_groups < num_groups:
        best_of_group = [np.sort(values[g * size : (g + 1) * size])[::-1] for g in range(num_groups)]
        group_scores = np.array([best[0] if score == "max" else best[0] + best[1] for best in best_of_group])
        kept = np.argsort(-group_scores, kind="stable")[:top_groups]
        values = np.where(np.isin(np.arange(len(values)) // size, kept), values, -np.inf)
    return np.argsort(-values, kind="stable")[:top_k]


def _sparse_mixer(scores: np.ndarray, jitter: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Liu et al., arXiv:2409.12136, without its sampling: the best expert, then the best of the others."""
    chosen: list[int] = []
    weights = []
    for _ in range(2):
        others = [e for e in range(len(scores)) if e not in chosen]
        best = max(others, key=lambda e: (scores[e], -e))
        largest = scores[best]
        near = [e for e in others if (largest - scores[e]) / max(abs(scores[e]), largest) <= 2 * jitter]
        weights.append(1 / sum(np.exp(scores[e] - largest) for e in near))
        chosen.append(best)
    return np.array(chosen), np.array(weights)
