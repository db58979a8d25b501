"""Where tokens go, as arrays: load, entropy, co-activation of experts, and how two routings differ.

Letters: L routed layers, B requests, T tokens, K experts a token, E experts. Everything is numpy, on the host.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from jax_moe_lora.errors import InputError

Chosen = Int[np.ndarray, "L B T K"]
Mask = Bool[np.ndarray, "B T"] | None


def expert_load(experts: Chosen, num_experts: int, where: Mask = None) -> Float[np.ndarray, "L E"]:
    """Each expert's part of a layer's routed pairs: a row sums to one, and `1 / E` is an even load.

    Args:
      experts: `[L, B, T, K]`, expert ids. where: `[B, T]`, the tokens that count; all of them where None.

    Raises:
      InputError: no token counts, or shapes that disagree.
    """
    return _chosen(experts, num_experts, where).mean(1) / experts.shape[-1]


def coactivation(experts: Chosen, num_experts: int, where: Mask = None) -> Float[np.ndarray, "L E E"]:
    """The part of tokens that choose both experts; on the diagonal, the part that choose the one.

    Divided by its diagonal, `c / c.diagonal(axis1=1, axis2=2)[:, :, None]`, row i says how often expert j comes along
    when i is chosen. Arguments and errors as in `expert_load`.
    """
    chosen = _chosen(experts, num_experts, where)
    return np.einsum("lni,lnj->lij", chosen, chosen) / chosen.shape[1]


def changed_experts(experts: Chosen, others: Chosen, where: Mask = None) -> Float[np.ndarray, "L"]:
    """The part of a layer's choices in `experts` that are not among the same token's choices in `others`: 0 to 1."""
    if experts.shape != others.shape:
        raise InputError(f"The routings are {list(experts.shape)} and {list(others.shape)}; give two of one shape.")
    kept = (experts[..., :, None] == others[..., None, :]).any(-1).mean(-1)
    return 1.0 - kept[:, _tokens(experts, where)].mean(-1)


def entropy(probabilities: Float[np.ndarray, "*N E"]) -> Float[np.ndarray, "*N"]:
    """Shannon entropy in bits over the last axis: 0 where one expert has everything, log2(E) where all have the same.

    Of an `expert_load` it says how even the load is; of a router's probabilities, how undecided a token is.
    """
    p = np.asarray(probabilities, np.float64)
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)


def divergence(p: Float[np.ndarray, "*N E"], q: Float[np.ndarray, "*N E"]) -> Float[np.ndarray, "*N"]:
    """Jensen-Shannon divergence in bits over the last axis: 0 where p and q are equal, 1 where they never meet."""
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0.0)


def _chosen(experts: Chosen, num_experts: int, where: Mask) -> Float[np.ndarray, "L N E"]:
    """1.0 where a token that counts chooses an expert."""
    if experts.size and not 0 <= experts.min() <= experts.max() < num_experts:
        raise InputError(f"Expert ids go from {experts.min()} to {experts.max()}; expected 0 to {num_experts - 1}.")
    of_tokens = experts[:, _tokens(experts, where)]
    return (of_tokens[..., None] == np.arange(num_experts)).any(-2).astype(np.float64)


def _tokens(experts: Chosen, where: Mask) -> Bool[np.ndarray, "B T"]:
    if experts.ndim != 4:
        raise InputError(f"The routing is {list(experts.shape)}; expected expert ids [L, B, T, K].")
    counts = np.ones(experts.shape[1:3], bool) if where is None else np.asarray(where)
    if counts.shape != experts.shape[1:3] or counts.dtype != bool:
        raise InputError(
            f"where is {counts.dtype} {list(counts.shape)}; expected bool {list(experts.shape[1:3])}, a token each."
        )
    if not counts.any():
        raise InputError("where holds for no token; choose at least one.")
    return counts
