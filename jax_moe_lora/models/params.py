"""The parameter tree of a decoder: one abstract spec gives initialisation and checkpoint loading their shapes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_moe_lora.config import ModelConfig
from pallas_kernels.pytrees import pytree
from pallas_kernels.routed_experts.weights import ExpertWeights


@pytree
@dataclass(frozen=True)
class AttentionParams:
    """q `[H*hd, D]`, k and v `[G*hd, D]`, o `[D, H*hd]`; norms and biases where the family has them.

    A norm as wide as its projection goes over all of it, one of `[hd]` over each head.
    """

    q: Float[Array, "queries D"]
    k: Float[Array, "keys D"]
    v: Float[Array, "keys D"]
    o: Float[Array, "D queries"]
    q_norm: Float[Array, "norm"] | None = None
    k_norm: Float[Array, "norm"] | None = None
    q_bias: Float[Array, "queries"] | None = None
    k_bias: Float[Array, "keys"] | None = None
    v_bias: Float[Array, "keys"] | None = None
    o_bias: Float[Array, "D"] | None = None


@pytree
@dataclass(frozen=True)
class DenseMLPParams:
    """gate and up `[M, D]`, down `[D, M]`."""

    gate: Float[Array, "M D"]
    up: Float[Array, "M D"]
    down: Float[Array, "D M"]


@pytree
@dataclass(frozen=True)
class MoEParams:
    """router `[E, D]`, the experts, and where the family has one the shared expert and its gate `[1, D]`."""

    router: Float[Array, "E D"]
    experts: ExpertWeights
    shared: DenseMLPParams | None = None
    shared_expert_gate: Float[Array, "1 D"] | None = None


@pytree
@dataclass(frozen=True)
class LayerParams:
    """Norms `[D]` before attention and before the MLP, which is dense or routed."""

    attention_norm: Float[Array, "D"]
    attention: AttentionParams
    mlp_norm: Float[Array, "D"]
    mlp: DenseMLPParams | MoEParams


@pytree
@dataclass(frozen=True)
class ModelParams:
    """embedding `[V, D]`; head `[V, D]`, or None where it is the embedding."""

    embedding: Float[Array, "V D"]
    layers: tuple[LayerParams, ...]
    norm: Float[Array, "D"]
    head: Float[Array, "V D"] | None


def abstract_params(config: ModelConfig, dtype: jax.typing.DTypeLike) -> ModelParams:
    """The tree with `jax.ShapeDtypeStruct` leaves."""

    def leaf(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    d, hd = config.hidden_size, config.head_dim
    queries, keys = config.num_heads * hd, config.num_kv_heads * hd
    widths = {"q": queries, "k": keys, "v": keys, "o": d}
    extra = {f"{module}_bias": leaf(widths[module]) for module in config.attention_biases}
    if config.qk_norm:
        extra |= {f"{module}_norm": leaf(hd if config.qk_norm == "head" else widths[module]) for module in "qk"}
    attention = AttentionParams(leaf(queries, d), leaf(keys, d), leaf(keys, d), leaf(d, queries), **extra)

    def mlp(width: int) -> DenseMLPParams:
        return DenseMLPParams(leaf(width, d), leaf(width, d), leaf(d, width))

    e, f, shared = config.moe.num_experts, config.moe.expert_width, config.shared_expert_width
    biases = (leaf(e, f), leaf(e, f), leaf(e, d)) if config.moe.expert_bias else ()
    experts = ExpertWeights(leaf(e, f, d), leaf(e, f, d), leaf(e, d, f), *biases)
    routed = MoEParams(leaf(e, d), experts, *((mlp(shared), leaf(1, d)) if shared else ()))
    dense = mlp(config.mlp_width)
    layers = tuple(
        LayerParams(leaf(d), attention, leaf(d), routed if is_moe else dense) for is_moe in config.moe_layers
    )
    head = None if config.tie_embeddings else leaf(config.vocab_size, d)
    return ModelParams(leaf(config.vocab_size, d), layers, leaf(d), head)


def init_params(config: ModelConfig, key: jax.Array, dtype: jax.typing.DTypeLike) -> ModelParams:
    """Random matrices, normal with deviation 0.02, made on the device leaf by leaf; norms are one, biases zero."""
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config, dtype))
    keys = jax.random.split(key, len(leaves))
    normal = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)

    def make(path: tuple[Any, ...], shape: tuple[int, ...], key: jax.Array) -> Array:
        name = jax.tree_util.keystr(path[-1:])
        if name.endswith("norm"):
            return jnp.ones(shape, dtype)
        return jnp.zeros(shape, dtype) if name.endswith("bias") else normal(key, shape)

    return jax.tree.unflatten(tree, [make(path, s.shape, k) for (path, s), k in zip(leaves, keys, strict=True)])
