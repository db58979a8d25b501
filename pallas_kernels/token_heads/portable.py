"""Norms, rotary embedding and the cache's new entries of one token per request, in one kernel.

A block has four heads of a request, a warp each: of q, of k or of v. The two halves of a head, which turn together, lie
in the same registers of two arrays. Caches are updated in place.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.portable.limits import ROWS
from pallas_kernels.portable.rows import Rows, compiler_params
from pallas_kernels.token_heads.norm import HeadNorm

Pair = tuple[Array, Array]


def token_heads(
    rows: Float[Array, "B width"],
    norm: HeadNorm | None,
    angles: tuple[Float[Array, "B half"], Float[Array, "B half"]],
    place: Int[Array, "B"],
    keys: Float[Array, "B M G hd"],
    values: Float[Array, "B M G hd"],
) -> tuple[Float[Array, "B H hd"], Float[Array, "B M G hd"], Float[Array, "B M G hd"]]:
    """As `api.token_heads`, without a backend.

    Args:
      rows: as there.
      norm: as there.
      angles: as there.
      place: as there.
      keys: as there; updated in place where XLA can give them away.
      values: likewise.
    """
    batch, places, groups, width = keys.shape
    half, count = width // 2, rows.shape[1] // width
    heads, dtype = count - 2 * groups, keys.dtype
    weights = () if norm is None else (norm.q.reshape(2, half), norm.k.reshape(2, half))

    def turn_and_store(rows, cosines, sines, place, *refs):
        *norms, keys, values, queries = refs
        request, first = lax.axis_index("request"), lax.axis_index("heads") * ROWS
        tile, at = Rows(half), place[request]

        def loaded() -> Pair:
            first_half, second = (tile.load(rows.at[request, pl.ds(first, ROWS), side]) for side in range(2))
            return first_half.astype(dtype), second.astype(dtype)

        def turned(module: int) -> Pair:
            pair = loaded()
            if norm is not None:
                pair = _normed(tile, pair, [tile.load_for_each(norms[module].at[side]) for side in range(2)], norm)
            first_half, second = (x.astype(jnp.float32) for x in pair)
            cosine, sine = tile.load_for_each(cosines.at[request]), tile.load_for_each(sines.at[request])
            turned_first = first_half * cosine - second * sine
            return turned_first.astype(dtype), (second * cosine + first_half * sine).astype(dtype)

        def store(out, pair: Callable[[], Pair], begin: int) -> None:
            for side, x in enumerate(pair()):
                out[pl.ds(first - begin, ROWS), side] = x

        stored = at < places
        is_query, is_key = first < heads, (first >= heads) & (first < heads + groups)
        pl.when(is_query)(lambda: store(queries.at[request], lambda: turned(0), 0))
        pl.when(stored & is_key)(lambda: store(keys.at[request, at], lambda: turned(1), heads))
        pl.when(stored & ~is_query & ~is_key)(lambda: store(values.at[request, at], loaded, heads + groups))

    stores = [jax.new_ref(cache.reshape(batch, places, groups, 2, half)) for cache in (keys, values)]
    queries = plgpu.kernel(
        turn_and_store,
        out_type=jax.ShapeDtypeStruct((batch, heads, 2, half), dtype),
        grid=(batch, count // ROWS),
        grid_names=("request", "heads"),
        compiler_params=compiler_params(),
    )(rows.reshape(batch, count, 2, half), *angles, place, *weights, *stores)
    keys, values = (jax.freeze(store).reshape(keys.shape) for store in stores)
    return queries.reshape(batch, heads, width), keys, values


def _normed(tile: Rows, pair: Pair, weights: list[Array], norm: HeadNorm) -> Pair:
    first, second = (x.astype(jnp.float32) for x in pair)
    mean = (first * first + second * second).sum(1) * (0.5 / first.shape[1])
    scale = tile.along(lax.rsqrt(mean + norm.eps))

    def scaled(x: Array, weight: Array) -> Array:
        if not (norm.offset or norm.wide):
            return (x * scale).astype(pair[0].dtype) * weight
        factor = weight.astype(jnp.float32)
        return (x * scale * (1.0 + factor if norm.offset else factor)).astype(pair[0].dtype)

    return scaled(first, weights[0]), scaled(second, weights[1])
