"""The heads of a decode step in one kernel: norms, rotary embedding and the cache's new entries.

Letters: B requests, M positions of the cache, H query heads, G key/value heads, hd head width.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_moe_lora.models.blocks.cache_places import LayerCache
from jax_moe_lora.models.blocks.context import StepContext
from jax_moe_lora.models.params import LayerParams
from jax_moe_lora.models.rope import cosines_and_sines, frequencies
from jax_moe_lora.models.specs.gqa import GQA
from pallas_kernels.backend import backend_named
from pallas_kernels.ops import choose
from pallas_kernels.token_heads import api
from pallas_kernels.token_heads.norm import HeadNorm
from pallas_kernels.varying import varying_axes


def in_one_kernel(
    spec: GQA, rows: tuple[Float[Array, "B _"], ...], dtype: jnp.dtype, cache: LayerCache, step: StepContext
) -> bool:
    """Whether the kernel serves a step of this block: a token per request, and heads as most families have them.

    Args:
      spec: the block's.
      rows: the projections of q, k and v.
      dtype: of the layer's rows, to which the projections are rounded.
      cache: the layer's.
      step: what every layer reads.
    """
    if step.kind != "token" or cache["k"].dtype != dtype or any(map(varying_axes, (*rows, *cache.values()))):
        return False
    backend = backend_named(choose(step.implementation, dtype=dtype).picked)
    num_heads, num_kv_heads, _ = (row.shape[1] // spec.head_dim for row in rows)
    fits = api.kernel_runs(num_heads, num_kv_heads, spec.head_dim)
    return fits and _turns_halves(spec) and backend.has("token_heads")


def _turns_halves(spec: GQA) -> bool:
    """Heads are normed one by one or not at all, then turned, the first half with the second; nothing else."""
    rope = spec.rope
    if rope is None or rope.interleaved or 2 * len(frequencies(rope, spec.head_dim)[0]) != spec.head_dim:
        return False
    normed = spec.qk_norm is None or (spec.qk_norm == "head" and not spec.qk_norm_last and spec.norm.kind == "rms")
    return normed and spec.clip is None and spec.gate != "q"


def token_heads(
    spec: GQA,
    weights: LayerParams,
    rows: tuple[Float[Array, "B _"], ...],
    place: Int[Array, "B"],
    cache: LayerCache,
    step: StepContext,
) -> tuple[Float[Array, "B 1 H hd"], LayerCache]:
    """The queries, and the cache with the step's tokens in it.

    Args:
      spec: the block's.
      weights: the layer's arrays.
      rows: float32, the projections of q, k and v.
      place: int32 `[B]`, where each token goes in the cache; M or more for one that is dropped.
      cache: the layer's.
      step: what every layer reads.
    """
    assert spec.rope is not None
    backend = choose(step.implementation, dtype=cache["k"].dtype).picked
    norm = None
    if spec.qk_norm is not None:
        norm = HeadNorm(weights["q_norm"], weights["k_norm"], spec.norm.eps, spec.norm.offset, spec.norm.wide)
    cosines, sines = cosines_and_sines(step.positions, spec.rope, spec.head_dim)
    angles, side_by_side = (cosines[:, 0], sines[:, 0]), jnp.concatenate(rows, axis=1)
    queries, keys, values = api.token_heads(side_by_side, norm, angles, place, cache["k"], cache["v"], backend)
    return queries[:, None], {"k": keys, "v": values}
