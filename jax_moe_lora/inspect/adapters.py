"""What an adapter has learnt, as arrays: singular values of each expert's update, its norm and its effective rank.

`delta W = scale * B @ A` is never made: with `A.T = Q_a T_a` and `B = Q_b T_b`, its singular values are those of
`scale * T_b @ T_a.T`, which is `[R, R]`.
"""

import numpy as np
from jaxtyping import Float

from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights
from jax_moe_lora.errors import InputError


def singular_values(weights: LoRAWeights) -> Float[np.ndarray, "E R"]:
    """Float64 singular values of each expert's `scale * B @ A`, largest first; zeros past an expert's own rank."""
    experts, rank = len(weights.ranks), weights.a.shape[1]
    live = np.arange(rank) < weights.ranks[:, None]
    a = np.where(live[:, :, None], weights.a.astype(np.float64), 0.0)
    b = np.where(live[:, None, :], weights.b.astype(np.float64), 0.0)
    small = np.linalg.qr(b, "r") @ np.linalg.qr(a.swapaxes(1, 2), "r").swapaxes(1, 2)
    found = np.linalg.svd(small, compute_uv=False) * np.abs(weights.scale.astype(np.float64))[:, None]
    return np.concatenate([found, np.zeros((experts, rank - found.shape[1]))], axis=1)  # a width may be below R


def spectra(adapter: LoRAAdapter, module: str) -> tuple[list[int], Float[np.ndarray, "L E R"]]:
    """`singular_values` of one module in all layers that the adapter has it in, and which layers these are.

    Args:
      module: a site's name, such as `gate`, `down` or `router`; dense ones have E = 1.

    Returns:
      layers, ascending, and float64 `[L, E, R]` with R the largest rank among them.

    Raises:
      InputError: the adapter has no such module.
    """
    layers = sorted(layer for layer, own in adapter.weights if own == module)
    if not layers:
        raise InputError(
            f"Adapter {adapter.name!r} has no module {module!r}; it has {', '.join(adapter.modules) or 'none'}."
        )
    of_layer = [singular_values(adapter.weights[layer, module]) for layer in layers]
    rank = max(values.shape[1] for values in of_layer)
    return layers, np.stack([np.pad(values, ((0, 0), (0, rank - values.shape[1]))) for values in of_layer])


def delta_norm(values: Float[np.ndarray, "*N R"]) -> Float[np.ndarray, "*N"]:
    """Frobenius norm of an update from its singular values."""
    return np.sqrt((np.asarray(values, np.float64) ** 2).sum(-1))


def effective_rank(values: Float[np.ndarray, "*N R"]) -> Float[np.ndarray, "*N"]:
    """The exponential of the entropy of the singular values' shares (Roy and Vetterli, 2007).

    1 where one direction carries an update, r where r of them carry it evenly; 0 for an update of zeros.
    """
    values = np.asarray(values, np.float64)
    total = values.sum(-1, keepdims=True)
    share = values / np.where(total > 0, total, 1.0)
    spread = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(spread), 0.0)
