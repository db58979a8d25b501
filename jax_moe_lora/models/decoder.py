"""A decoder-only transformer with routed experts, as pure functions over parameters, bank and cache.

Letters: B requests, T tokens of a request, M positions of the cache, H query heads, G key/value heads, hd head width.
Layers are unrolled, not scanned: `bench.py` has the measurement.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.adapters.bank import AdapterBank
from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.linear import dense_plan, lora_linear
from jax_moe_lora.models.params import AttentionParams, DenseMLPParams, LayerParams, ModelParams
from jax_moe_lora.models.rope import rotate
from jax_moe_lora.moe import LayerAdapters, moe_lora
from pallas_kernels import BASE_SLOT, Implementation, RoutingPlan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of a batch.

    Attributes:
      k, v: for each layer `[B, M, G, hd]`. lengths: int32 `[B]`, positions in use; 0 marks an unused row.
    """

    k: tuple[Float[Array, "B M G hd"], ...]
    v: tuple[Float[Array, "B M G hd"], ...]
    lengths: Int[Array, "B"]


@dataclass(frozen=True)
class Step:
    """What every layer of one step needs beside its weights."""

    config: ModelConfig
    positions: Int[Array, "B T"]
    row_mask: Bool[Array, "B T"]
    slots: Int[Array, "N"]
    plan: RoutingPlan | None
    implementation: Implementation | None


# (layer, keys, values) of the step's tokens -> (keys, values) to attend to.
KeyValueStore = Callable[[int, Array, Array], tuple[Array, Array]]


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


def init_cache(config: ModelConfig, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """An empty cache for `batch` requests of at most `max_length` tokens, prompt and answer together."""
    shape = (batch, max_length, config.num_kv_heads, config.head_dim)
    empty = tuple(jnp.zeros(shape, dtype) for _ in range(2 * config.num_layers))
    return Cache(empty[: config.num_layers], empty[config.num_layers :], jnp.zeros(batch, jnp.int32))


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
    step, mask = prompt_step(tokens, lengths, slots, bank, config, implementation)
    hidden = _layers(params, bank, params.embedding[tokens], step, lambda layer, k, v: (k, v), mask)
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
    step, mask = prompt_step(tokens, lengths, slots, bank, config, implementation)
    keys, values = list(cache.k), list(cache.v)

    def store(layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        keys[layer] = lax.dynamic_update_slice(keys[layer], k, (0, 0, 0, 0))
        values[layer] = lax.dynamic_update_slice(values[layer], v, (0, 0, 0, 0))
        return k, v

    hidden = _layers(params, bank, params.embedding[tokens], step, store, mask)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    return Cache(tuple(keys), tuple(values), lengths.astype(jnp.int32)), head(params, last)[:, 0]


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
    batch, max_length = cache.k[0].shape[:2]
    live = cache.lengths > 0
    positions = cache.lengths[:, None]
    row_slots = jnp.where(live, slots, BASE_SLOT)
    step = Step(config, positions, live[:, None], row_slots, _plan(bank, row_slots), implementation)
    mask = jnp.arange(max_length)[None, None, :] <= positions[:, :, None]
    rows = jnp.arange(batch)
    keys, values = list(cache.k), list(cache.v)

    def store(layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        keys[layer] = keys[layer].at[rows, cache.lengths].set(k[:, 0], mode="drop")
        values[layer] = values[layer].at[rows, cache.lengths].set(v[:, 0], mode="drop")
        return keys[layer], values[layer]

    hidden = _layers(params, bank, params.embedding[tokens[:, None]], step, store, mask)
    lengths = jnp.where(live, jnp.minimum(cache.lengths + 1, max_length), 0)
    return Cache(tuple(keys), tuple(values), lengths), head(params, hidden)[:, 0]


def prompt_step(
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: Int[Array, "B"],
    bank: AdapterBank | None,
    config: ModelConfig,
    implementation: Implementation | None,
) -> tuple[Step, Bool[Array, "B T T"]]:
    """What the layers need to read right-padded prompts, and the causal mask."""
    batch, width = tokens.shape
    index = jnp.arange(width, dtype=jnp.int32)
    real = index[None, :] < lengths[:, None]
    row_slots = jnp.where(real, slots[:, None], BASE_SLOT).reshape(-1)
    positions = jnp.broadcast_to(index[None, :], (batch, width))
    step = Step(config, positions, real, row_slots, _plan(bank, row_slots), implementation)
    return step, jnp.broadcast_to(index[None, :] <= index[:, None], (batch, width, width))


def _plan(bank: AdapterBank | None, row_slots: Int[Array, "N"]) -> RoutingPlan | None:
    return None if bank is None else dense_plan(row_slots, bank.num_slots)


def _layers(
    params: ModelParams,
    bank: AdapterBank | None,
    hidden: Float[Array, "B T D"],
    step: Step,
    store: KeyValueStore,
    mask: Bool[Array, "B T M"],
) -> Float[Array, "B T D"]:
    for index, layer in enumerate(params.layers):
        adapters = {} if bank is None else bank.layer(index)
        hidden = run_layer(layer, adapters, hidden, step, partial(store, index), mask)
    return rms_norm(hidden, params.norm, step.config.rms_eps)


def run_layer(
    layer: LayerParams,
    adapters: LayerAdapters,
    hidden: Float[Array, "B T D"],
    step: Step,
    store: Callable[[Array, Array], tuple[Array, Array]],
    mask: Bool[Array, "B T M"],
) -> Float[Array, "B T D"]:
    """One decoder layer: attention, then its MLP, each behind a norm and with a residual."""
    eps = step.config.rms_eps
    normed = rms_norm(hidden, layer.attention_norm, eps)
    hidden = hidden + _attention(layer.attention, adapters, normed, step, store, mask)
    return hidden + _mlp(layer, adapters, rms_norm(hidden, layer.mlp_norm, eps), step)


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
    store: Callable[[Array, Array], tuple[Array, Array]],
    mask: Bool[Array, "B T M"],
) -> Float[Array, "B T D"]:
    config = step.config
    batch, width, _ = x.shape

    def heads(module: str, count: int, norm: Array | None) -> Float[Array, "B T heads hd"]:
        bias = getattr(weights, f"{module}_bias")
        y = _linear(x, getattr(weights, module), bias, adapters.get(module), step)
        y = y.reshape(batch, width, count, config.head_dim)
        return y if norm is None else rms_norm(y, norm, config.rms_eps)

    q = rotate(heads("q", config.num_heads, weights.q_norm), step.positions, config.rope)
    k = rotate(heads("k", config.num_kv_heads, weights.k_norm), step.positions, config.rope)
    keys, values = store(k, heads("v", config.num_kv_heads, None))
    with jax.default_matmul_precision("highest" if x.dtype == jnp.float32 else "default"):
        mixed = jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None])
    mixed = mixed.reshape(batch, width, config.num_heads * config.head_dim)
    return _linear(mixed, weights.o, weights.o_bias, adapters.get("o"), step)


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
