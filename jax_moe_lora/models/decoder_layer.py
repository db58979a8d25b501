"""One decoder layer: attention and an MLP, dense or routed, each behind a norm and with a residual.

Letters: B requests, T tokens of a request, M positions of the cache, H query heads, G key/value heads, hd head width.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.config import ModelConfig
from jax_moe_lora.layer.linear import DensePlan, lora_linear
from jax_moe_lora.layer.moe import moe_lora, router_scores
from jax_moe_lora.models.attention import AttentionBackend, attend_cache, attend_chunk, attend_packed, attend_prompt
from jax_moe_lora.models.cache import KeyValues, store
from jax_moe_lora.models.params import AttentionParams, DenseMLPParams, LayerParams, MoEParams
from jax_moe_lora.models.rope import rotate
from pallas_kernels.ops import Implementation, LayerPages
from pallas_kernels.pages import NO_ADAPTERS
from pallas_kernels.pytrees import pytree


@runtime_checkable
class Bank(Protocol):
    """What a decoder reads its adapters from: an `AdapterBank`, or what training makes of its parameters."""

    @property
    def num_slots(self) -> int: ...

    def layer(self, layer: int) -> LayerPages: ...


@pytree
@dataclass(frozen=True)
class StepContext:
    """What every layer of one step needs beside its weights.

    Attributes:
      positions: int32 `[B, T]`, the place of each token in its request.
      row_mask: bool `[B, T]`, False for padding.
      slots: int32 `[B * T]`, adapter slot of each token.
      plan: of the slots, for the dense projections.
      segments: int32 `[B, T]`, the example of each token where a row packs several; None where it holds one.
      kind: static. A `prompt` attends to itself. A `token` attends to the cache, whose next position it takes. A
        `chunk` of tokens attends to the cache and to itself.
      keep_scores: static. Return the router's scores too. remat: static. As in `moe_lora`.
    """

    positions: Int[Array, "B T"]
    row_mask: Bool[Array, "B T"]
    slots: Int[Array, "N"]
    plan: DensePlan | None
    segments: Int[Array, "B T"] | None
    kind: Literal["prompt", "token", "chunk"] = field(metadata={"static": True})
    config: ModelConfig = field(metadata={"static": True})
    implementation: Implementation | None = field(metadata={"static": True})
    attention: AttentionBackend = field(metadata={"static": True})
    keep_scores: bool = field(default=False, metadata={"static": True})
    remat: bool = field(default=False, metadata={"static": True})


@jax.jit
def run_layer(
    layer: LayerParams,
    adapters: LayerPages | None,
    hidden: Float[Array, "B T D"],
    step: StepContext,
    cache: KeyValues | None,
) -> tuple[Float[Array, "B T D"], KeyValues | None, Float[Array, "N E"] | None]:
    """One decoder layer: attention, then its MLP, each behind a norm and with a residual.

    Args:
      layer: its weights.
      adapters: the layer's pages, from `Bank.layer`, or None for the base model.
      hidden: `[B, T, D]`.
      step: what every layer reads.
      cache: the layer's keys and values, or None to keep none.

    Returns:
      The hidden rows, the cache with the step's tokens in it, and where `step.keep_scores` float32 router scores of the
      B * T tokens (None in a layer without a router).
    """
    adapters = NO_ADAPTERS if adapters is None else adapters
    eps = step.config.rms_eps
    normed = rms_norm(hidden, layer.attention_norm, eps)
    mixed, cache = _attention(layer.attention, adapters, normed, step, cache)
    hidden = hidden + mixed
    y, scores = _mlp(layer, adapters, rms_norm(hidden, layer.mlp_norm, eps), step)
    return hidden + y, cache, scores if step.keep_scores else None


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm over the last axis; float32 inside, x's dtype outside."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def _attention(
    weights: AttentionParams,
    adapters: LayerPages,
    x: Float[Array, "B T D"],
    step: StepContext,
    cache: KeyValues | None,
) -> tuple[Float[Array, "B T D"], KeyValues | None]:
    config = step.config
    batch, width, _ = x.shape

    def heads(module: str, count: int, norm: Array | None) -> Float[Array, "B T heads hd"]:
        bias = getattr(weights, f"{module}_bias")
        y = _linear(x, getattr(weights, module), bias, adapters.get(module), step)
        if norm is not None:  # over each head, or over the whole projection
            y = rms_norm(y.reshape(batch, width, -1, norm.shape[0]), norm, config.rms_eps)
        if config.clip_qkv is not None:
            y = jnp.clip(y, -config.clip_qkv, config.clip_qkv)
        return y.reshape(batch, width, count, config.head_dim)

    q = rotate(heads("q", config.num_heads, weights.q_norm), step.positions, config.rope)
    k = rotate(heads("k", config.num_kv_heads, weights.k_norm), step.positions, config.rope)
    v = heads("v", config.num_kv_heads, None)
    cache = None if cache is None else store(cache, k, v, None if step.kind == "prompt" else step.positions)
    if step.segments is not None:
        mixed = attend_packed(q, k, v, step.segments, step.attention)
    elif step.kind == "prompt":
        mixed = attend_prompt(q, k, v, step.attention)
    elif step.kind == "chunk":
        assert cache is not None
        mixed = attend_chunk(q, *cache, jnp.where(step.row_mask, step.positions, 0), step.attention)
    else:
        assert cache is not None
        in_use = jnp.minimum(step.positions[:, 0] + 1, cache[0].shape[1])
        mixed = attend_cache(q, *cache, in_use, step.attention)
    mixed = mixed.reshape(batch, width, config.num_heads * config.head_dim)
    return _linear(mixed, weights.o, weights.o_bias, adapters.get("o"), step), cache


def _mlp(
    layer: LayerParams, adapters: LayerPages, x: Float[Array, "B T D"], step: StepContext
) -> tuple[Float[Array, "B T D"], Float[Array, "N E"] | None]:
    """The layer's MLP, and its router's scores where it has a router."""
    weights = layer.mlp
    if isinstance(weights, DenseMLPParams):
        return _dense_mlp(weights, "mlp", adapters, x, step), None
    flat = x.reshape(-1, x.shape[-1])
    scores = router_scores(flat, weights.router, adapters, step.slots, step.implementation)
    rows = moe_lora(
        flat,
        None,
        weights.experts,
        step.config.moe,
        adapters,
        step.slots,
        row_mask=step.row_mask.reshape(-1),
        scores=scores,
        implementation=step.implementation,
        remat=step.remat,
    )
    y = rows.reshape(x.shape)
    if weights.shared is not None:
        y = y + _shared_expert(weights, adapters, x, step)
    return y, scores


def _shared_expert(
    weights: MoEParams, adapters: LayerPages, x: Float[Array, "B T D"], step: StepContext
) -> Float[Array, "B T D"]:
    """The expert that every token goes through, by the weight that its own sigmoid gate gives it."""
    assert weights.shared is not None
    gate = _linear(x, weights.shared_expert_gate, None, adapters.get("shared_expert_gate"), step)
    return jax.nn.sigmoid(gate) * _dense_mlp(weights.shared, "shared", adapters, x, step)


def _dense_mlp(
    weights: DenseMLPParams, modules: str, adapters: LayerPages, x: Float[Array, "B T D"], step: StepContext
) -> Float[Array, "B T D"]:
    """SwiGLU; `modules` is what its adapters' names begin with."""
    gate = _linear(x, weights.gate, None, adapters.get(f"{modules}_gate"), step)
    up = _linear(x, weights.up, None, adapters.get(f"{modules}_up"), step)
    return _linear(jax.nn.silu(gate) * up, weights.down, None, adapters.get(f"{modules}_down"), step)


def _linear(x: Float[Array, "B T in"], weight, bias, pages, step: StepContext) -> Float[Array, "B T out"]:
    rows = lora_linear(x.reshape(-1, x.shape[-1]), weight, bias, pages, step.plan, step.implementation)
    return rows.reshape(*x.shape[:-1], -1).astype(x.dtype)
