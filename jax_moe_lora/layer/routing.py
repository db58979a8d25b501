"""From router scores to experts and their weights, and from requests to token slots."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.arguments import whole
from jax_moe_lora.config import CHOICE_BIAS, MoEConfig, RouterKind
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer import checks
from jax_moe_lora.layer.sparse_mixer import sparse_mixer
from jax_moe_lora.layer.torch_tensors import takes_any_array
from pallas_kernels.backend import backend_named
from pallas_kernels.ops import BASE_SLOT, Implementation
from pallas_kernels.router.api import kernel_runs
from pallas_kernels.varying import varying_as


@takes_any_array("config")
def route(
    scores: Float[Array, "T E"],
    config: MoEConfig,
    bias: Float[Array, "E"] | None = None,
    chosen: Int[Array, "T K"] | None = None,
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """Chooses each token's experts.

    Args:
      scores: float32 `[T, E]`, the router's matmul.
      config: the layer's sizes and its kind of router.
      bias: `[E]`, added to the scores; with a router of `CHOICE_BIAS` it is for the choice alone and no
        part of the weights.
      chosen: int32 `[T, K]`, experts that were chosen before, such as those of the generation that a trainer replays:
        they get the weights that these scores give them. The router chooses where they are negative.

    Returns:
      `(weights float32 [T, K], experts int32 [T, K])`, largest first; of equal scores the lower expert wins, and of
      equal groups the lower group.

    Raises:
      InputError: scores or a bias for another number of experts, or that are not floating point; an unknown router;
        groups that the experts do not fill, or that leave a token fewer than K experts.
    """
    _check_router(scores, config, bias)
    if chosen is not None:
        checks.check_array("chosen", chosen, (scores.shape[0], config.top_k), "integers")
    if bias is not None and config.router not in CHOICE_BIAS:
        scores = scores + bias.astype(scores.dtype)[None]
    if config.router == "sparsemixer":
        if config.top_k != 2:
            raise InputError(f"config.top_k is {config.top_k}; a sparsemixer router chooses 2 experts.")
        weights, experts = sparse_mixer(scores, config.jitter, chosen)
        return weights * config.scaling, experts
    values = _expert_values(scores, config.router)
    for_choice = values if bias is None or config.router not in CHOICE_BIAS else values + bias[None]
    experts = lax.top_k(_of_best_groups(for_choice, config), config.top_k)[1]
    if chosen is not None:
        experts = jnp.where(chosen < 0, experts, chosen.astype(experts.dtype))
    weights = jnp.take_along_axis(values, experts, axis=-1)
    if config.router == "topk_softmax":
        weights = jax.nn.softmax(weights, axis=-1)
    if config.renormalize:
        total = weights.sum(-1, keepdims=True) + config.renormalize_eps
        weights = weights / (jnp.maximum(total, config.renormalize_floor) if config.renormalize_floor else total)
    return weights * config.scaling, experts.astype(jnp.int32)


def _check_router(scores: Float[Array, "T E"], config: MoEConfig, bias: Float[Array, "E"] | None) -> None:
    whole("config.top_k", config.top_k, 1, config.num_experts)
    checks.check_groups(config)
    checks.check_scores(scores, "T", config)
    checks.check_router_bias(bias, config)
    if config.router not in get_args(RouterKind):
        raise _unknown(config.router)


def route_in_kernel(
    scores: Float[Array, "T E"],
    config: MoEConfig,
    bias: Float[Array, "E"] | None,
    backend: Implementation,
    row_mask: Bool[Array, "T"] | None = None,
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """`route` by the backend's kernel, where it has one for such a router; else through XLA.

    Args:
      scores: float32 `[T, E]`.
      config: the layer's.
      bias: `[E]`, as in `route`.
      backend: a backend that runs rows of the layer's dtype here.
      row_mask: bool `[T]`, False for padding, whose scores may hold anything; None for none.

    Returns:
      As `route`; padding has the weight zero, at expert E.

    Raises:
      InputError: as `route`.
    """
    has_kernel = backend_named(backend).has("route") and kernel_runs(config)
    if not has_kernel or scores.shape[0] == 0 or scores.dtype != jnp.float32:
        return masked_routing(config, row_mask, *route(scores, config, bias))
    _check_router(scores, config, bias)
    bias = None if bias is None else bias.astype(jnp.float32)
    return _route_in_kernel((config, backend), *varying_as((scores, bias, row_mask)))


def masked_routing(
    config: MoEConfig, row_mask: Bool[Array, "T"] | None, weights: Float[Array, "T K"], experts: Int[Array, "T K"]
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """Weights and experts as they are; of padding zero, and E.

    Args:
      config: the layer's.
      row_mask: bool `[T]`, False for padding; None for none.
      weights: float32 `[T, K]`.
      experts: int32 `[T, K]`.
    """
    if row_mask is None:
        return weights, experts
    # Padding may hold NaN, and NaN times zero is NaN.
    return jnp.where(row_mask[:, None], weights, 0.0), jnp.where(row_mask[:, None], experts, config.num_experts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _route_in_kernel(
    static: tuple[MoEConfig, Implementation], scores: Array, bias: Array | None, row_mask: Array | None
):
    config, backend = static
    return backend_named(backend).module("route").route(scores, bias, config.router in CHOICE_BIAS, config, row_mask)


def _route_forward(static, scores, bias, row_mask):
    weights, experts = _route_in_kernel(static, scores, bias, row_mask)
    return (weights, experts), (scores, bias, row_mask, experts)


def _route_backward(static, kept, cotangents):
    config, (scores, bias, row_mask, experts) = static[0], kept

    if row_mask is not None:  # padding may hold NaN
        scores = jnp.where(row_mask[:, None], scores, 0)

    def weigh(scores, bias):
        weights, _ = route(scores, config, bias, experts.clip(0, config.num_experts - 1))
        return masked_routing(config, row_mask, weights, experts)[0]

    return *jax.vjp(weigh, scores, bias)[1](cotangents[0]), None


_route_in_kernel.defvjp(_route_forward, _route_backward)


def _expert_values(scores: Float[Array, "T E"], router: RouterKind) -> Float[Array, "T E"]:
    """What a router compares experts by."""
    if router in ("softmax_topk", "softmax_bias"):
        return jax.nn.softmax(scores, axis=-1)
    return jax.nn.sigmoid(scores) if router == "sigmoid_bias" else scores


def _of_best_groups(values: Float[Array, "T E"], config: MoEConfig) -> Float[Array, "T E"]:
    """The values of the experts that a token may choose; minus infinity for those of its other groups."""
    if config.top_groups == config.num_groups:
        return values
    grouped = values.reshape(values.shape[0], config.num_groups, -1)
    two = config.group_score == "top2_sum"
    group_values = lax.top_k(grouped, 2)[0].sum(axis=-1) if two else grouped.max(axis=-1)
    best = lax.top_k(group_values, config.top_groups)[1]
    kept = (best[:, :, None] == jnp.arange(config.num_groups, dtype=best.dtype)[None, None, :]).any(axis=1)
    return jnp.where(kept[:, :, None], grouped, -jnp.inf).reshape(values.shape)


@takes_any_array("router")
def expert_probabilities(scores: Float[Array, "T E"], router: RouterKind) -> Float[Array, "T E"]:
    """Each token's scores as a distribution over all experts, which a router's auxiliary loss is made of.

    A softmax router's is the softmax over all experts, also where its weights are a softmax over some of them
    (`topk_softmax`, `sparsemixer`). A sigmoid router's is each sigmoid divided by the token's sum of them. A bias for
    the choice is no part of either (DeepSeek-V3, arXiv:2412.19437, equations 18 to 20).

    Args:
      scores: float32 `[T, E]`, the router's matmul.
      router: its kind.

    Returns:
      float32 `[T, E]`; each row sums to one.
    """
    if router in ("softmax_topk", "topk_softmax", "softmax_bias", "sparsemixer"):
        return jax.nn.softmax(scores, axis=-1)
    if router == "sigmoid_bias":
        return jax.nn.softmax(jax.nn.log_sigmoid(scores), axis=-1)  # of scores far below zero too
    raise _unknown(router)


def _unknown(router: str) -> InputError:
    return InputError(f"router is {router!r}; expected one of {', '.join(get_args(RouterKind))}.")


def token_slots(
    num_tokens: int,
    slots: Int[Array, "T"] | None = None,
    request_lengths: Int[Array, "N"] | None = None,
    request_slots: Int[Array, "N"] | None = None,
) -> Int[Array, "T"]:
    """The adapter slot of each token, given per token or per request.

    Args:
      num_tokens: T.
      slots: int32 `[T]`, a slot per token.
      request_lengths: int32 `[N]`, in place of `slots`: the tokens of each request, in order. Tokens past the last
        request have no adapter.
      request_slots: int32 `[N]`, with `request_lengths`: the slot of each request.

    Returns:
      int32 `[T]`; all `BASE_SLOT` where nothing is given.

    Raises:
      InputError: both forms, half a form, a wrong shape or dtype, or (where the values are known) lengths that are
        negative or sum to more than T.
    """
    if slots is not None and (request_lengths is not None or request_slots is not None):
        raise InputError(
            "slots came together with request_lengths or request_slots; give slots per token or per request."
        )
    if (request_lengths is None) != (request_slots is None):
        given, missing = (
            ("request_slots", "request_lengths") if request_lengths is None else ("request_lengths", "request_slots")
        )
        raise InputError(f"{given} came without {missing}; the per-request form needs both.")
    if slots is not None:
        return _check("slots", slots, (num_tokens,))
    if request_lengths is None or request_slots is None:
        return jnp.full(num_tokens, BASE_SLOT, jnp.int32)
    lengths = _check("request_lengths", request_lengths, None)
    per_request = _check("request_slots", request_slots, lengths.shape)
    _check_known_lengths(num_tokens, lengths)
    request = jnp.searchsorted(jnp.cumsum(lengths), jnp.arange(num_tokens), side="right")
    return jnp.append(per_request, BASE_SLOT)[request].astype(jnp.int32)


def check_request_lengths(x: Array, request_lengths: Array | None = None, **_: object) -> None:
    """What `token_slots` asks of lengths whose values are known, of the arguments of a layer.

    Args:
      x: `[T, D]`.
      request_lengths: as in `token_slots`.

    Raises:
      InputError: lengths that are negative, or sum to more than T.
    """
    if request_lengths is not None:
        _check_known_lengths(x.shape[0], _check("request_lengths", request_lengths, None))


def _check_known_lengths(num_tokens: int, lengths: Int[Array, "N"]) -> None:
    if isinstance(lengths, jax.core.Tracer):
        return
    known = np.asarray(lengths)
    if (known < 0).any() or known.sum() > num_tokens:
        raise InputError(
            f"request_lengths are {known.tolist()}; expected none negative and a sum of at most {num_tokens}."
        )


def _check(name: str, values: Int[Array, "N"], shape: tuple[int, ...] | None) -> Int[Array, "N"]:
    if not isinstance(values, jax.Array):
        values = np.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        raise InputError(f"{name} has dtype {values.dtype}; expected integers.")
    if values.ndim != 1 or (shape is not None and values.shape != shape):
        raise InputError(f"{name} has shape {list(values.shape)}; expected {list(shape) if shape else '[N]'}.")
    if values.dtype.itemsize == 8:  # a cast to 32 bits would wrap around, onto another adapter's slot
        values = values.clip(-1 if jnp.issubdtype(values.dtype, jnp.signedinteger) else 0, 2**31 - 1)
    return jnp.asarray(values).astype(jnp.int32)
