"""The parameter tree of a decoder: one table gives initialisation and checkpoint loading their shapes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_moe_lora.models.specs.model import ModelConfig, layer_parameters
from jax_moe_lora.models.specs.parameter import Init
from pallas_kernels.pytrees import pytree
from pallas_kernels.quantised.array import Quantised

LayerParams = Mapping[str, Any]
"""A layer's arrays by the names of its table (`specs.parameter.Parameter`); projections may be `Quantised`."""


@pytree
@dataclass(frozen=True)
class ModelParams:
    """The arrays of a model.

    Attributes:
      embedding: `[V, D]`.
      layers: each layer's arrays by name, such as `q` `[H*hd, D]` or `gate` `[E, F, D]`; projections may be
        quantised.
      norm: `[D]`, the last norm's weight.
      head: `[V, D]`, or None where it is the embedding.
      norm_bias: `[D]`, where the last norm has one.
      head_bias: `[V]`, where the head has one.
    """

    embedding: Float[Array, "V D"]
    layers: tuple[LayerParams, ...]
    norm: Float[Array, "D"]
    head: Float[Array, "V D"] | Quantised | None
    norm_bias: Float[Array, "D"] | None = None
    head_bias: Float[Array, "V"] | None = None


def abstract_params(config: ModelConfig, dtype: jax.typing.DTypeLike) -> ModelParams:
    """The tree with `jax.ShapeDtypeStruct` leaves."""

    def leaf(*shape: int, float32: bool = False) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(jnp.float32 if float32 else dtype))

    d, v = config.hidden_size, config.vocab_size
    layers = tuple(
        {row.name: leaf(*row.shape, float32=row.float32) for row in layer_parameters(layer, d)}
        for layer in config.layers
    )
    return ModelParams(
        leaf(v, d),
        layers,
        leaf(d),
        None if config.tie_embeddings else leaf(v, d),
        leaf(d) if config.norm.kind == "layer" else None,
        leaf(v) if config.head_bias else None,
    )


def init_params(
    config: ModelConfig,
    key: jax.Array,
    dtype: jax.typing.DTypeLike,
    placements: ModelParams | None = None,
    finish: Callable[[str, Array], Any] = lambda path, leaf: leaf,
) -> ModelParams:
    """Random matrices, normal with deviation 0.02, made on the device leaf by leaf; norms are one, biases zero.

    Args:
      config: the model's.
      key: jax's random key.
      dtype: of the arrays.
      placements: a sharding for each array, of which a device then makes its part; None for the default device.
      finish: what a leaf becomes before the next is made, of its path and its array.
    """
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config, dtype))
    inits: dict[str, Init] = {
        row.name: row.init for layer in config.layers for row in layer_parameters(layer, config.hidden_size)
    }
    inits |= {"norm": "zeros" if config.norm.offset else "ones", "norm_bias": "zeros", "head_bias": "zeros"}
    keys = jax.random.split(key, len(leaves))
    places = [None] * len(leaves) if placements is None else jax.tree.leaves(placements)

    def make(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, key: jax.Array, place: Any) -> Array:
        init = inits.get(leaf_name(path[-1]), "normal")
        if init == "normal":
            return _normal(place)(key, leaf.shape, leaf.dtype)
        return (jnp.ones if init == "ones" else jnp.zeros)(leaf.shape, leaf.dtype, device=place)

    made = [
        finish(".".join(map(leaf_name, path)), make(path, leaf, *where))
        for (path, leaf), *where in zip(leaves, keys, places, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


@cache
def _normal(place: jax.sharding.Sharding | None) -> Callable[..., Array]:
    """Draws an array where it lies; one program per shape."""
    draw = lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype)  # noqa: E731
    return jax.jit(draw, static_argnames=("shape", "dtype"), out_shardings=place)


def leaf_name(key: Any) -> str:
    """What a key of the tree is called: an attribute's name, a key, or an index."""
    return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))))
