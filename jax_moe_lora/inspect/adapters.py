"""What an adapter has learnt, as arrays: the singular values, norm and effective rank of each expert's update.

The update `scale * B @ A` is never formed. With the QR decompositions `A.T = Q_a T_a` and `B = Q_b T_b`, its singular
values are those of `scale * T_b @ T_a.T`, which is only `[R, R]`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights
from jax_moe_lora.errors import InputError
from jax_moe_lora.tools.read import read_adapter


def singular_values(weights: LoRAWeights) -> Float[np.ndarray, "E R"]:
    """Singular values of each expert's update `scale * B @ A`.

    Args:
      weights: one module of one layer of an adapter.

    Returns:
      float64 `[E, R]`, largest first, with zeros past an expert's own rank.
    """
    experts, rank = len(weights.ranks), weights.a.shape[1]
    live = np.arange(rank) < weights.ranks[:, None]
    a = np.where(live[:, :, None], weights.a.astype(np.float64), 0.0)
    b = np.where(live[:, None, :], weights.b.astype(np.float64), 0.0)
    small = np.linalg.qr(b, "r") @ np.linalg.qr(a.swapaxes(1, 2), "r").swapaxes(1, 2)
    values = np.linalg.svd(small, compute_uv=False) * np.abs(weights.scale.astype(np.float64))[:, None]
    return np.concatenate([values, np.zeros((experts, rank - values.shape[1]))], axis=1)  # a width may be below R


def spectra(
    adapter: LoRAAdapter | str | Path, module: str, model: Any = None
) -> tuple[list[int], Float[np.ndarray, "L E R"]]:
    """`singular_values` of one module in every layer where the adapter changes it.

    Args:
      adapter: an adapter in host memory, the name of one that `model` has, or an adapter's folder or hub id.
      model: for a name the `Model`; for a folder a `Model`, a `ModelConfig`, or a model's folder or hub id.
      module: the module's name, such as `gate`, `down` or `router`; a module that is not per expert has E = 1.

    Returns:
      The L layers' numbers, ascending, and float64 `[L, E, R]`, where R is the largest rank among the layers.

    Raises:
      InputError: the adapter has no such module, or a name or folder came without a model.
      AdapterFormatError: the folder's files are not understood, or do not fit the model.
    """
    adapter = _on_host(adapter, model)
    layers = sorted(layer for layer, name in adapter.weights if name == module)
    if not layers:
        raise InputError(
            f"Adapter {adapter.name!r} has no module {module!r}; it has {', '.join(adapter.modules) or 'none'}."
        )
    of_layer = [singular_values(adapter.weights[layer, module]) for layer in layers]
    rank = max(values.shape[1] for values in of_layer)
    return layers, np.stack([np.pad(values, ((0, 0), (0, rank - values.shape[1]))) for values in of_layer])


def _on_host(adapter: LoRAAdapter | str | Path, model: Any) -> LoRAAdapter:
    if isinstance(adapter, LoRAAdapter):
        return adapter
    if model is None:
        raise InputError(f"The adapter is {str(adapter)!r}; give model= too, the Model that has it or its folder.")
    if str(adapter) in getattr(model, "adapter_status", ()):
        return model.adapter(str(adapter))
    return read_adapter(adapter, model)


def delta_norm(values: Float[np.ndarray, "*N R"]) -> Float[np.ndarray, "*N"]:
    """Frobenius norm of an update.

    Args:
      values: `[..., R]`, the singular values of each update.

    Returns:
      float64 `[...]`.
    """
    return np.sqrt((np.asarray(values, np.float64) ** 2).sum(-1))


def effective_rank(values: Float[np.ndarray, "*N R"]) -> Float[np.ndarray, "*N"]:
    """Number of directions that an update really uses (Roy and Vetterli, 2007).

    It is the exponential of the entropy of the normalised singular values: 1 if one direction carries the whole update,
    r if r directions carry it evenly, and 0 for an update of zeros.

    Args:
      values: `[..., R]`, the singular values of each update.

    Returns:
      float64 `[...]`.
    """
    values = np.asarray(values, np.float64)
    total = values.sum(-1, keepdims=True)
    share = values / np.where(total > 0, total, 1.0)
    spread = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)
    return np.where(total[..., 0] > 0, np.exp(spread), 0.0)
