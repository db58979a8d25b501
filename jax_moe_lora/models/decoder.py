"""A decoder-only transformer with routed experts, as pure functions over parameters, bank and cache.

Letters: B requests, T tokens of a request, M positions of the cache, H query heads, G key/value heads, hd head width.
Layers are unrolled, not scanned (`benchmark/scan.py` has the measurement). `run_layer` is jitted on its own: all layers
of a kind share one trace, and XLA compiles their kernels once.
"""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.linear import DensePlan, dense_plan, lora_linear
from jax_moe_lora.models.attention import AttentionBackend, attend_cache, attend_prompt, choose_attention
from jax_moe_lora.models.cache import Cache, KeyValues, init_cache, store
from jax_moe_lora.models.params import AttentionParams, DenseMLPParams, LayerParams, ModelParams
from jax_moe_lora.models.rope import rotate
from jax_moe_lora.moe import LayerAdapters, moe_lora
from pallas_kernels import BASE_SLOT, Implementation

__all__ = [
    "Cache",
    "Step",
    "adapter_sites",
    "decode",
    "head",
    "init_cache",
    "logits",
    "prefill",
    "prompt_step",
    "run_layer",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """What every layer of one step needs beside its weights.

    Attributes:
      positions, row_mask: `[B, T]`, place of each token in its request, and whether it is one.
      slots: int32 `[B * T]`, adapter slot of each token. plan: of the slots, for the dense projections.
      kind: static. A `prompt` attends to itself; a `token` attends to the cache, whose next position it takes.
    """

    positions: Int[Array, "B T"]
    row_mask: Bool[Array, "B T"]
    slots: Int[Array, "N"]
    plan: DensePlan | None
    kind: Literal["prompt", "token"] = field(metadata={"static": True})
    config: ModelConfig = field(metadata={"static": True})
    implementation: Implementation | None = field(metadata={"static": True})
    attention: AttentionBackend = field(metadata={"static": True})


def adapter_sites(config: ModelConfig) -> dict[str, Site]:
    """The projections of a model that adapters may target."""
    every = tuple(range(config.num_layers))
    routed = tuple(layer for layer in every if config.moe_layers[layer])
    dense = tuple(layer for layer in every if not config.moe_layers[layer])
    d, f, e = config.hidden_size, config.moe.expert_width, config.moe.num_experts
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sites = {
        "q": Site(d, queries, 1, every),
        "k": Site(d, keys, 1, every),
        "v": Site(d, keys, 1, every),
        "o": Site(queries, d, 1, every),
        "router": Site(d, e, 1, routed),
        "gate": Site(d, f, e, routed),
        "up": Site(d, f, e, routed),
        "down": Site(f, d, e, routed),
        "mlp_gate": Site(d, config.mlp_width, 1, dense),
        "mlp_up": Site(d, config.mlp_width, 1, dense),
        "mlp_down": Site(config.mlp_width, d, 1, dense),
    }
    return {module: site for module, site in sites.items() if site.layers}


def logits(
    params: ModelParams,
    bank: AdapterBank | None,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
) -> Float[Array, "B T V"]:
    """Float32 logits at every position of right-padded prompts; those past a request's length mean nothing."""
    step = prompt_step(tokens, lengths, slots, bank, params, config, implementation)
    hidden, _, _ = _layers(params, bank, params.embedding[tokens], step, None)
    return head(params, hidden)


def prefill(
    params: ModelParams,
    bank: AdapterBank | None,
    cache: Cache,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
) -> tuple[Cache, Float[Array, "B V"]]:
    """Reads right-padded prompts into an empty cache.

    Args:
      tokens: int32 `[B, T]`, T at most the cache's M. lengths: int32 `[B]`, real tokens of each prompt; a row of
        length 0 is unused and costs nothing in the experts. slots: int32 `[B]`, `BASE_SLOT` for the base model.

    Returns:
      The filled cache, and float32 `[B, V]` logits after each prompt's last token.
    """
    step = prompt_step(tokens, lengths, slots, bank, params, config, implementation)
    hidden, keys, values = _layers(params, bank, params.embedding[tokens], step, cache)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    return Cache(keys, values, lengths.astype(jnp.int32)), head(params, last)[:, 0]


def decode(
    params: ModelParams,
    bank: AdapterBank | None,
    cache: Cache,
    tokens: Int[Array, "B"],
    slots: Int[Array, "B"],
    *,
    config: ModelConfig,
    implementation: Implementation | None = None,
) -> tuple[Cache, Float[Array, "B V"]]:
    """One more token of each request.

    Args:
      tokens: int32 `[B]`, the token at position `cache.lengths`. A row that is full (`lengths == M`) no longer writes:
        its logits mean nothing.

    Returns:
      The cache with the token in it, and float32 `[B, V]` logits of the next one.
    """
    max_length = cache.k[0].shape[1]
    live = cache.lengths > 0
    row_slots = jnp.where(live, slots, BASE_SLOT)
    step = _step("token", cache.lengths[:, None], live[:, None], row_slots, bank, params, config, implementation)
    hidden, keys, values = _layers(params, bank, params.embedding[tokens[:, None]], step, cache)
    lengths = jnp.where(live, jnp.minimum(cache.lengths + 1, max_length), 0)
    return Cache(keys, values, lengths), head(params, hidden)[:, 0]


def prompt_step(
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    bank: AdapterBank | None,
    params: ModelParams,
    config: ModelConfig,
    implementation: Implementation | None,
) -> Step:
    """What the layers need to read right-padded prompts."""
    batch, width = tokens.shape
    index = jnp.arange(width, dtype=jnp.int32)
    real = index[None, :] < lengths[:, None]
    row_slots = jnp.where(real, slots[:, None], BASE_SLOT).reshape(-1)
    positions = jnp.broadcast_to(index[None, :], (batch, width))
    return _step("prompt", positions, real, row_slots, bank, params, config, implementation)


def _step(
    kind: Literal["prompt", "token"],
    positions: Int[Array, "B T"],
    row_mask: Bool[Array, "B T"],
    row_slots: Int[Array, "N"],
    bank: AdapterBank | None,
    params: ModelParams,
    config: ModelConfig,
    implementation: Implementation | None,
) -> Step:
    heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
    attention = choose_attention(implementation, dtype=params.embedding.dtype, **heads).picked
    plan = None if bank is None else dense_plan(row_slots, bank.num_slots)
    return Step(positions, row_mask, row_slots, plan, kind, config, implementation, attention)


def _layers(
    params: ModelParams, bank: AdapterBank | None, hidden: Float[Array, "B T D"], step: Step, cache: Cache | None
) -> tuple[Float[Array, "B T D"], tuple[Array, ...], tuple[Array, ...]]:
    """All layers and the last norm; the cache's keys and values with the step's tokens in them."""
    keys, values = [], []
    for index, layer in enumerate(params.layers):
        own = None if bank is None else bank.of_layer(index)
        hidden, stored = run_layer(
            layer, own, hidden, step, None if cache is None else (cache.k[index], cache.v[index])
        )
        if stored is not None:
            keys.append(stored[0])
            values.append(stored[1])
    return rms_norm(hidden, params.norm, step.config.rms_eps), tuple(keys), tuple(values)


@jax.jit
def run_layer(
    layer: LayerParams,
    bank: AdapterBank | None,
    hidden: Float[Array, "B T D"],
    step: Step,
    cache: KeyValues | None,
) -> tuple[Float[Array, "B T D"], KeyValues | None]:
    """One decoder layer: attention, then its MLP, each behind a norm and with a residual.

    Args:
      bank: the layer's own, from `AdapterBank.of_layer`. cache: the layer's keys and values, or None to keep none.

    Returns:
      The hidden rows, and the cache with the step's tokens in it.
    """
    adapters = {} if bank is None else bank.layer(0)
    eps = step.config.rms_eps
    normed = rms_norm(hidden, layer.attention_norm, eps)
    mixed, cache = _attention(layer.attention, adapters, normed, step, cache)
    hidden = hidden + mixed
    return hidden + _mlp(layer, adapters, rms_norm(hidden, layer.mlp_norm, eps), step), cache


def rms_norm(x: Float[Array, "*B D"], weight: Float[Array, "D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm over the last axis; float32 inside, x's dtype outside."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale).astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def _attention(
    weights: AttentionParams,
    adapters: LayerAdapters,
    x: Float[Array, "B T D"],
    step: Step,
    cache: KeyValues | None,
) -> tuple[Float[Array, "B T D"], KeyValues | None]:
    config = step.config
    batch, width, _ = x.shape

    def heads(module: str, count: int, norm: Array | None) -> Float[Array, "B T heads hd"]:
        bias = getattr(weights, f"{module}_bias")
        y = _linear(x, getattr(weights, module), bias, adapters.get(module), step)
        y = y.reshape(batch, width, count, config.head_dim)
        return y if norm is None else rms_norm(y, norm, config.rms_eps)

    q = rotate(heads("q", config.num_heads, weights.q_norm), step.positions, config.rope)
    k = rotate(heads("k", config.num_kv_heads, weights.k_norm), step.positions, config.rope)
    v = heads("v", config.num_kv_heads, None)
    cache = None if cache is None else store(cache, k, v, None if step.kind == "prompt" else step.positions[:, 0])
    if step.kind == "prompt":
        mixed = attend_prompt(q, k, v, step.attention)
    else:
        assert cache is not None
        in_use = jnp.minimum(step.positions[:, 0] + 1, cache[0].shape[1])
        mixed = attend_cache(q, *cache, in_use, step.attention)
    mixed = mixed.reshape(batch, width, config.num_heads * config.head_dim)
    return _linear(mixed, weights.o, weights.o_bias, adapters.get("o"), step), cache


def _mlp(layer: LayerParams, adapters: LayerAdapters, x: Float[Array, "B T D"], step: Step) -> Float[Array, "B T D"]:
    weights = layer.mlp
    if isinstance(weights, DenseMLPParams):
        gate = _linear(x, weights.gate, None, adapters.get("mlp_gate"), step)
        up = _linear(x, weights.up, None, adapters.get("mlp_up"), step)
        return _linear(jax.nn.silu(gate) * up, weights.down, None, adapters.get("mlp_down"), step)
    rows = moe_lora(
        x.reshape(-1, x.shape[-1]),
        weights.router,
        weights.experts,
        step.config.moe,
        adapters,
        step.slots,
        row_mask=step.row_mask.reshape(-1),
        implementation=step.implementation,
    )
    return rows.reshape(x.shape)


def _linear(x: Float[Array, "B T in"], weight, bias, pages, step: Step) -> Float[Array, "B T out"]:
    rows = lora_linear(x.reshape(-1, x.shape[-1]), weight, bias, pages, step.plan, step.implementation)
    return rows.reshape(*x.shape[:-1], -1).astype(x.dtype)


def head(params: ModelParams, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """Float32 logits over the vocabulary."""
    weight = params.embedding if params.head is None else params.head
    rows = lora_linear(hidden.reshape(-1, hidden.shape[-1]), weight)
    return rows.reshape(*hidden.shape[:-1], -1)
