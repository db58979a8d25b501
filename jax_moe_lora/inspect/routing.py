"""Where tokens go, as arrays: load, entropy and co-activation of experts, and how two routings differ.

Letters: L routed layers, B requests, T tokens, K experts per token, E experts. Everything is numpy, on the host.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from jax_moe_lora.errors import InputError

Chosen = Int[np.ndarray, "L B T K"]
Mask = Bool[np.ndarray, "B T"] | None


def expert_load(experts: Chosen, num_experts: int, where: Mask = None) -> Float[np.ndarray, "L E"]:
    """Each expert's share of a layer's routed pairs (a token and one of its experts).

    Args:
      experts: int `[L, B, T, K]`, expert ids.
      num_experts: E.
      where: bool `[B, T]`, the tokens that count; None counts all of them.

    Returns:
      float64 `[L, E]`; each row sums to 1, and an even load is `1 / E`.

    Raises:
      InputError: no token counts, an expert id is out of range, or shapes disagree.
    """
    return _chosen(experts, num_experts, where).mean(1) / experts.shape[-1]


def coactivation(experts: Chosen, num_experts: int, where: Mask = None) -> Float[np.ndarray, "L E E"]:
    """Share of tokens that choose both of two experts.

    Divided by its diagonal, `c / c.diagonal(axis1=1, axis2=2)[:, :, None]`, row i says how often expert j is chosen too
    when expert i is chosen.

    Args:
      experts: int `[L, B, T, K]`, expert ids.
      num_experts: E.
      where: bool `[B, T]`, the tokens that count; None counts all of them.

    Returns:
      float64 `[L, E, E]`; on the diagonal, the share of tokens that choose the expert at all.

    Raises:
      InputError: no token counts, an expert id is out of range, or shapes disagree.
    """
    chosen = _chosen(experts, num_experts, where)
    return np.einsum("lni,lnj->lij", chosen, chosen) / chosen.shape[1]


def changed_experts(experts: Chosen, others: Chosen, where: Mask = None) -> Float[np.ndarray, "L"]:
    """Share of expert choices that differ between two routings of the same tokens.

    Args:
      experts: int `[L, B, T, K]`, expert ids of one routing.
      others: int `[L, B, T, K]`, expert ids of the other.
      where: bool `[B, T]`, the tokens that count; None counts all of them.

    Returns:
      float64 `[L]`, from 0 (the same experts) to 1 (none in common). The order of a token's experts does not count.

    Raises:
      InputError: no token counts, or shapes disagree.
    """
    if experts.shape != others.shape:
        raise InputError(
            f"The routings are {list(experts.shape)} and {list(others.shape)}; give two of the same shape."
        )
    kept = (experts[..., :, None] == others[..., None, :]).any(-1).mean(-1)
    return 1.0 - kept[:, _tokens(experts, where)].mean(-1)


def entropy(probabilities: Float[np.ndarray, "*N E"]) -> Float[np.ndarray, "*N"]:
    """Shannon entropy over the last axis.

    The entropy of an `expert_load` says how even the load is; that of a router's probabilities, how undecided the
    router is about a token.

    Args:
      probabilities: `[..., E]`, each row summing to 1.

    Returns:
      float64 `[...]`, bits: 0 if one expert has everything, log2(E) if all have the same.
    """
    p = np.asarray(probabilities, np.float64)
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)


def divergence(p: Float[np.ndarray, "*N E"], q: Float[np.ndarray, "*N E"]) -> Float[np.ndarray, "*N"]:
    """Jensen-Shannon divergence over the last axis.

    Args:
      p: `[..., E]`, each row summing to 1.
      q: `[..., E]`, each row summing to 1.

    Returns:
      float64 `[...]`, bits: 0 if p and q are equal, 1 if they share no expert.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0.0)


def _chosen(experts: Chosen, num_experts: int, where: Mask) -> Float[np.ndarray, "L N E"]:
    """1.0 where a token that counts chooses the expert, else 0.0."""
    if experts.size and not 0 <= experts.min() <= experts.max() < num_experts:
        raise InputError(f"Expert ids go from {experts.min()} to {experts.max()}; expected 0 to {num_experts - 1}.")
    of_tokens = experts[:, _tokens(experts, where)]
    return (of_tokens[..., None] == np.arange(num_experts)).any(-2).astype(np.float64)


def _tokens(experts: Chosen, where: Mask) -> Bool[np.ndarray, "B T"]:
    """The tokens that count, checked."""
    if experts.ndim != 4:
        raise InputError(f"The routing is {list(experts.shape)}; expected expert ids [L, B, T, K].")
    counts = np.ones(experts.shape[1:3], bool) if where is None else np.asarray(where)
    if counts.shape != experts.shape[1:3] or counts.dtype != bool:
        raise InputError(
            f"where is {counts.dtype} {list(counts.shape)}; expected bool {list(experts.shape[1:3])}, one per token."
        )
    if not counts.any():
        raise InputError("where is False for every token; set at least one to True.")
    return counts
