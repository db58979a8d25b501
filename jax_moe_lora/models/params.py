"""The parameter tree of a decoder: one abstract spec gives initialisation and checkpoint loading their shapes."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_moe_lora.config import ModelConfig
from jax_moe_lora.types import ExpertWeights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionParams:
    """q `[H*hd, D]`, k and v `[G*hd, D]`, o `[D, H*hd]`; norms `[hd]` and biases where the family has them."""

    q: Float[Array, "queries D"]
    k: Float[Array, "keys D"]
    v: Float[Array, "keys D"]
    o: Float[Array, "D queries"]
    q_norm: Float[Array, "hd"] | None = None
    k_norm: Float[Array, "hd"] | None = None
    q_bias: Float[Array, "queries"] | None = None
    k_bias: Float[Array, "keys"] | None = None
    v_bias: Float[Array, "keys"] | None = None
    o_bias: Float[Array, "D"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseMLPParams:
    """gate and up `[M, D]`, down `[D, M]`."""

    gate: Float[Array, "M D"]
    up: Float[Array, "M D"]
    down: Float[Array, "D M"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEParams:
    """router `[E, D]`, and the experts."""

    router: Float[Array, "E D"]
    experts: ExpertWeights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerParams:
    """Norms `[D]` before attention and before the MLP, which is dense or routed."""

    attention_norm: Float[Array, "D"]
    attention: AttentionParams
    mlp_norm: Float[Array, "D"]
    mlp: DenseMLPParams | MoEParams


@jax.tree_util.register_dataclass
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
    norm = leaf(hd) if config.qk_norm else None
    biases = {"q_bias": leaf(queries), "k_bias": leaf(keys), "v_bias": leaf(keys), "o_bias": leaf(d)}
    attention = AttentionParams(
        leaf(queries, d),
        leaf(keys, d),
        leaf(keys, d),
        leaf(d, queries),
        norm,
        norm,
        **(biases if config.attention_bias else {}),
    )
    e, f, m = config.moe.num_experts, config.moe.expert_width, config.mlp_width
    routed = MoEParams(leaf(e, d), ExpertWeights(leaf(e, f, d), leaf(e, f, d), leaf(e, d, f)))
    dense = DenseMLPParams(leaf(m, d), leaf(m, d), leaf(d, m))
    layers = tuple(
        LayerParams(leaf(d), attention, leaf(d), routed if is_moe else dense) for is_moe in config.moe_layers
    )
    head = None if config.tie_embeddings else leaf(config.vocab_size, d)
    return ModelParams(leaf(config.vocab_size, d), layers, leaf(d), head)


def init_params(config: ModelConfig, key: jax.Array, dtype: jax.typing.DTypeLike) -> ModelParams:
    """Random weights, normal with deviation 0.02 (norms are one), made on the device leaf by leaf."""
    leaves, tree = jax.tree.flatten(abstract_params(config, dtype))
    keys = jax.random.split(key, len(leaves))
    make = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, dtype), static_argnums=1)
    values = [
        make(k, s.shape) if len(s.shape) > 1 else jnp.ones(s.shape, dtype) for k, s in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, values)
