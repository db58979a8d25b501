"""Gemma 4's attention (`specs/gemma4.py`): forward pass. Its cache is that of grouped-query attention."""

import jax
from jaxtyping import Array, Float

from jax_moe_lora.models.blocks import gqa
from jax_moe_lora.models.blocks.cache_places import LayerCache
from jax_moe_lora.models.blocks.context import StepContext, linear, linears
from jax_moe_lora.models.blocks.norm import rms_norm
from jax_moe_lora.models.blocks.partial_sums import total
from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.specs.gemma4 import Gemma4Attention
from pallas_kernels.ops import LayerPages


def init_cache(spec: Gemma4Attention, batch: int, max_length: int, dtype: jax.typing.DTypeLike) -> LayerCache:
    """An empty cache, as of `gqa`; values that are keys stand in it too, since keys are turned and normed.

    Args:
      spec: the block's.
      batch: B.
      max_length: M.
      dtype: of keys and values.
    """
    return gqa.init_cache(spec.heads, batch, max_length, dtype)


def forward(
    spec: Gemma4Attention,
    weights: LayerParams,
    adapters: LayerPages,
    x: Float[Array, "B T D"],
    step: StepContext,
    cache: LayerCache | None,
) -> tuple[Float[Array, "B T D"], LayerCache | None]:
    """Mixes the tokens of each request.

    Args:
      spec: the block's.
      weights: the layer's arrays.
      adapters: the layer's pages.
      x: `[B, T, D]`.
      step: what every layer reads.
      cache: the layer's, or None to keep none.

    Returns:
      `[B, T, D]`, and the cache with the step's tokens in it.
    """
    heads, modules = spec.heads, "qk" if spec.keys_are_values else "qkv"
    q, k, *values = linears([f"{spec.modules}{module}" for module in modules], weights, adapters, x, step)
    v = values[0] if values else k
    q = gqa.split_heads(heads, "q", weights, q, step)
    k = gqa.split_heads(heads, "k", weights, k, step)
    v = rms_norm(v.reshape(k.shape), None, heads.norm.eps)
    mixed, cache = gqa.attend(heads, q, k, v, None, step, cache)
    mixed = mixed.reshape(*x.shape[:2], -1)
    return total(linear(f"{spec.modules}o", weights, adapters, mixed, step)), cache
