"""The pure layer: a Mixture-of-Experts layer whose rows each use their own LoRA adapter."""

from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.adapters.lora import EXPERT_MODULES
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer import checks
from jax_moe_lora.layer.linear import dense_plan, lora_linear
from jax_moe_lora.layer.routing import check_request_lengths, masked_routing, route, route_in_kernel, token_slots
from jax_moe_lora.layer.torch_tensors import takes_any_array
from pallas_kernels import ops
from pallas_kernels.grouped_matmul.api import operands_of
from pallas_kernels.ops import (
    Activation,
    Implementation,
    LayerPages,
    choose,
    choose_for,
    make_plan,
)
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.routed_experts.weights import ExpertWeights
from pallas_kernels.varying import varying_as


@takes_any_array("config", "implementation", "remat", check=check_request_lengths)
def moe_lora(
    x: Float[Array, "T D"],
    router: Float[Array, "E D"] | Quantised | None,
    experts: ExpertWeights,
    config: MoEConfig,
    adapters: LayerPages | None = None,
    slots: Int[Array, "T"] | None = None,
    *,
    request_lengths: Int[Array, "N"] | None = None,
    request_slots: Int[Array, "N"] | None = None,
    router_bias: Float[Array, "E"] | None = None,
    row_mask: Bool[Array, "T"] | None = None,
    scores: Float[Array, "T E"] | None = None,
    implementation: Implementation | None = None,
    remat: bool = False,
) -> Float[Array, "T D"]:
    """Routes each token to its top-k experts and applies them with the token's own adapter.

    With expert e in a token's top-k, router weight p_e, slot s, and
    `lin(W, A, B; x) = x W[e]^T + c (x A[s,e]^T) B[s,e]^T`: `y = sum_e p_e * lin(down; act(lin(gate; x)) * lin(up; x))`.

    Args:
      x: `[T, D]`, float32, bfloat16 or float16.
      router: `[E, D]`, the router's weight; None where `scores` are given.
      experts: all experts' weights, each an array or quantised.
      config: sizes, router and activation (static).
      adapters: the layer's adapters, from `AdapterBank.layer`; None serves the base model.
      slots: int32 `[T]`, adapter slot of each token, `BASE_SLOT` for none.
      request_lengths: int32 `[N]`, in place of `slots`: the tokens of each request.
      request_slots: int32 `[N]`, with `request_lengths`: the adapter slot of each request.
      router_bias: `[E]`, as in `routing.route`.
      row_mask: bool `[T]`, False for padding: such rows are multiplied with no expert and give zeros.
      scores: `[T, E]`, in place of `router`: what `router_scores` gave for these rows.
      implementation: a backend of the grouped ops by name, or None for the best available.
      remat: for gradients: multiply gate and up again in the backward pass, in place of keeping both products.

    Returns:
      `[T, D]` in x's dtype. A base row has the bits of `adapters=None`; a row's bits do not depend on other rows'
      adapters.

    Raises:
      InputError: router and scores together, or neither; both forms of slots, or half of one; a module that is not
        known; shapes that disagree with the config, or dtypes of another kind.
    """
    tokens = checks.check_layer_input(x, config)
    checks.check_router(router, scores, tokens, config)
    checks.check_router_bias(router_bias, config)
    checks.check_row_mask(row_mask, tokens)
    checks.check_experts(experts, config)
    checks.check_biases(experts, config)
    checks.check_adapters(adapters, config)
    slot_of_token = token_slots(tokens, slots, request_lengths, request_slots)
    if router is not None:
        if row_mask is not None:
            x, router, adapters, router_bias = _masked_rows(row_mask, x, router, adapters, router_bias)
        scores = router_scores(x, router, adapters, slot_of_token, implementation)
    assert scores is not None
    backend = choose(implementation, dtype=x.dtype).picked
    weights, chosen = choose_experts(scores, config, router_bias, row_mask, masked=router is not None, backend=backend)
    return routed_experts(x, weights, chosen, experts, config, adapters, slot_of_token, implementation, remat)


def choose_experts(
    scores: Float[Array, "T E"],
    config: MoEConfig,
    bias: Float[Array, "E"] | None,
    row_mask: Bool[Array, "T"] | None,
    chosen: Int[Array, "T K"] | None = None,
    masked: bool = False,
    backend: Implementation = "xla",
) -> tuple[Float[Array, "T K"], Int[Array, "T K"]]:
    """`routing.route` where some rows are padding: those have the weight zero, at no expert.

    Args:
      scores: float32 `[T, E]`.
      config: sizes and router.
      bias: `[E]`, as in `route`.
      row_mask: bool `[T]`, False for padding, whose scores may hold anything.
      chosen: as in `route`.
      masked: the scores are made of rows that are masked for gradients already.
      backend: the one whose kernel chooses, where it has one; XLA weighs what is given in `chosen`.
    """
    if row_mask is not None and not masked:
        scores, bias = _masked_rows(row_mask, scores, bias)
    if chosen is None:
        return route_in_kernel(scores, config, bias, backend, row_mask)
    return masked_routing(config, row_mask, *route(scores, config, bias, chosen))


def _masked_rows(row_mask: Bool[Array, "T"], rows: Float[Array, "T width"], *others: Any) -> tuple[Any, ...]:
    """Rows or scores, and what they meet, as they are; where one of them is differentiated, masked rows are zeros.

    Without it gradients would be NaN where masked rows hold NaN, also those of a router over rows that have none: zero
    times NaN is NaN. The forward pass reads no masked row, so serving does not pay for the copy.
    """
    return _masked_for_gradients(*varying_as((row_mask, rows, others)))


@jax.custom_vjp
def _masked_for_gradients(row_mask: Array, rows: Array, others: tuple[Any, ...]) -> tuple[Any, ...]:
    del row_mask
    return rows, *others


def _masked_forward(row_mask: Array, rows: Array, others: tuple[Any, ...]) -> tuple[tuple[Any, ...], Array]:
    return (jnp.where(row_mask[:, None], rows, 0), *others), row_mask


def _masked_backward(row_mask: Array, cotangents: tuple[Any, ...]) -> tuple[None, Array, tuple[Any, ...]]:
    drows, *dothers = cotangents
    return None, jnp.where(row_mask[:, None], drows, 0), tuple(dothers)


_masked_for_gradients.defvjp(_masked_forward, _masked_backward)


@takes_any_array("implementation")
def router_scores(
    x: Float[Array, "T D"],
    router: Float[Array, "E D"] | Quantised,
    adapters: LayerPages | None = None,
    slots: Int[Array, "T"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T E"]:
    """The router's scores with each token's own adapter.

    Args:
      x: `[T, D]`, float32, bfloat16 or float16.
      router: `[E, D]`, the router's weight.
      adapters: the layer's adapters, of which the module `router` is used.
      slots: int32 `[T]`, adapter slot of each token, `BASE_SLOT` for none.
      implementation: as in `lora_linear`.

    Returns:
      float32 `[T, E]`.

    Raises:
      InputError: shapes that disagree, or dtypes of another kind.
    """
    checks.check_linear(x, router, None)
    pages = adapters["router"] if adapters is not None and "router" in checks.module_names(adapters) else None
    slot_of_token = token_slots(x.shape[0], slots)
    plan = None if pages is None else dense_plan(slot_of_token, pages.scale.shape[0])
    return lora_linear(x, router, None, pages, plan, implementation)


@takes_any_array("config", "implementation", "remat")
def routed_experts(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    chosen: Int[Array, "T K"],
    experts: ExpertWeights,
    config: MoEConfig,
    adapters: LayerPages | None = None,
    slots: Int[Array, "T"] | None = None,
    implementation: Implementation | None = None,
    remat: bool = False,
) -> Float[Array, "T D"]:
    """The layer after its router: each token through its chosen experts, weighted and summed.

    Args:
      x: `[T, D]`, float32, bfloat16 or float16.
      weights: float32 `[T, K]`, router weights.
      chosen: int32 `[T, K]`, expert ids; one outside `0 .. E-1` is skipped.
      experts: all experts' weights.
      config: sizes and activation (static). E may be less than K, where these are some of the experts.
      adapters: the layer's adapters; float32 pages beside 16-bit rows are rounded to these, and their gradients are
        float32.
      slots: int32 `[T]`, adapter slot of each token, `BASE_SLOT` for none.
      implementation: a backend of the grouped ops by name, or None for the best available.
      remat: as in `moe_lora`.

    Returns:
      `[T, D]` in x's dtype.

    Raises:
      InputError: as `moe_lora`.
    """
    tokens = checks.check_layer_input(x, config)
    checks.check_choice(weights, chosen, tokens, config)
    checks.check_experts(experts, config)
    checks.check_adapters(adapters, config)
    slot_of_token = token_slots(tokens, slots)
    if config.activation not in get_args(Activation):
        raise InputError(f"activation is {config.activation!r}; expected one of {', '.join(get_args(Activation))}.")
    if tokens == 0:
        return x
    pages = None if adapters is None else adapters.only(EXPERT_MODULES)
    several = (experts.gate, experts.up, experts.down)
    choice = choose_for(x, several, pages, x.dtype, implementation, rounded=True)
    num_slots = 0 if pages is None else pages.num_slots
    operands = operands_of(x, several, pages)
    plan = make_plan(
        chosen, slot_of_token, experts.gate.shape[0], num_slots, choice.picked, dtype=x.dtype, operands=operands
    )
    return ops.routed_experts(x, weights, experts, pages, plan, config.activation, remat)
