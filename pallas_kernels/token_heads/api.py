"""The heads of one token of each request: normed, turned, and keys and values stored in the cache.

Letters: B requests, M positions of the cache, H query heads, G key/value heads, hd head width.
"""

from functools import partial

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.backend import Implementation, backend_named
from pallas_kernels.errors import InputError
from pallas_kernels.portable.limits import LANES, ROWS
from pallas_kernels.token_heads import xla
from pallas_kernels.token_heads.norm import HeadNorm


def kernel_runs(num_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    """Whether the kernel serves heads of these sizes: four at a time, whose halves fill the lanes of a warp.

    Args:
      num_heads: H.
      num_kv_heads: G.
      head_dim: hd.
    """
    return num_heads % ROWS == num_kv_heads % ROWS == 0 and head_dim % (2 * LANES) == 0


def token_heads(
    rows: Float[Array, "B width"],
    norm: HeadNorm | None,
    angles: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    place: Int[Array, "B"],
    keys: Float[Array, "B M G hd"],
    values: Float[Array, "B M G hd"],
    backend: Implementation,
) -> tuple[Float[Array, "B H hd"], Float[Array, "B M G hd"], Float[Array, "B M G hd"]]:
    """The queries, and the caches with each token's key and value in its place. It has a gradient.

    Args:
      rows: float32 `[B, (H + 2 G) * hd]`, the projections of q, k and v side by side; rounded to the cache's dtype
        before anything else.
      norm: of q and k, in the cache's dtype; None for none.
      angles: float32 `[B, hd / 2]` each, cosines and sines that turn a head's halves.
      place: int32 `[B]`, where in the cache, from 0; a token at M or behind is dropped.
      keys: the cache's.
      values: the cache's, in the dtype of its keys.
      backend: one that has the op, for sizes of which `kernel_runs` says so.

    Returns:
      Queries, keys, values; in the cache's dtype.

    Raises:
      UnsupportedImplementation: the backend has no such op.
      InputError: sizes that the kernel does not serve.
    """
    groups, head_dim = keys.shape[2:]
    heads = rows.shape[1] // head_dim - 2 * groups
    if not kernel_runs(heads, groups, head_dim):
        raise InputError(
            f"Got {heads} heads and {groups} key/value heads of width {head_dim}; expected multiples of {ROWS}, "
            f"and a width that is one of {2 * LANES}."
        )
    return _token_heads(backend, rows, norm, angles, place, keys, values)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_heads(backend: Implementation, *operands):
    return backend_named(backend).module("token_heads").token_heads(*operands)


def _forward(backend, *operands):
    return _token_heads(backend, *operands), operands


def _backward(backend, operands, cotangents):
    return jax.vjp(xla.token_heads, *operands)[1](cotangents)


_token_heads.defvjp(_forward, _backward)
