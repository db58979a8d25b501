"""What gated delta-net keeps between steps: padding, rows that are used again, and rows that get no token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.models.blocks import delta_net
from jax_moe_lora.models.specs.delta_net import DeltaNet
from jax_moe_lora.models.steps import make_step
from pallas_kernels.pages import NO_ADAPTERS
from support.layers import assert_close

pytestmark = pytest.mark.optimised

SPEC, D = DeltaNet(2, 4, 8, 6, kernel=3), 16
B, T = 3, 12


def weights() -> dict[str, jax.Array]:
    rows = SPEC.parameters(D)
    keys = jax.random.split(jax.random.key(0), len(rows))
    return {row.name: jax.random.normal(key, row.shape) for row, key in zip(rows, keys, strict=True)}


def inputs(count: int = T, seed: int = 1) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (B, count, D))


def run(x: jax.Array, lengths, kind: str = "prompt", cache=None, starts=(0,) * B):
    starts = jnp.asarray(starts, jnp.int32)
    real = jnp.arange(x.shape[1])[None] < jnp.asarray(lengths)[:, None]
    positions = starts[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    step = make_step(kind, positions, real, jnp.full(x.shape[0] * x.shape[1], -1, jnp.int32), None, None, starts)
    cache = delta_net.init_cache(SPEC, B, T, "float32") if cache is None else cache
    return jax.jit(delta_net.forward, static_argnums=0)(SPEC, weights(), NO_ADAPTERS, x, step, cache)


def same(one, other) -> bool:
    return all((a == b).all() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_what_padding_holds_reaches_nothing():
    lengths, x = (12, 7, 1), inputs()
    real = (jnp.arange(T)[None] < jnp.asarray(lengths)[:, None])[..., None]
    y, cache = run(jnp.where(real, x, jnp.nan), lengths)
    expected, kept = run(jnp.where(real, x, 0.0), lengths)
    assert same(cache, kept)
    assert same(jnp.where(real, y, 0.0), jnp.where(real, expected, 0.0))
    for row, length in enumerate(lengths):
        _, alone = run(x[:, :length], (length,) * B)
        for name in cache:
            assert_close(cache[name][row], np.asarray(alone[name][row]), 1e-6)


def test_a_request_begins_with_zeros_whatever_its_row_held():
    garbage = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), delta_net.init_cache(SPEC, B, T, "float32"))
    for kind in ("prompt", "chunk"):
        assert same(run(inputs(), (T,) * B, kind, garbage), run(inputs(), (T,) * B, kind))


def test_rows_without_tokens_keep_their_state():
    _, cache = run(inputs(), (T,) * B)
    for kind, x in (("chunk", inputs(5, seed=2)), ("token", inputs(1, seed=3))):
        _, after = run(x, (0, 1, 0), kind, cache, starts=(T,) * B)
        for name in cache:
            assert (after[name][0] == cache[name][0]).all(), (kind, name)
            assert (after[name][2] == cache[name][2]).all(), (kind, name)
            assert (after[name][1] != cache[name][1]).any(), (kind, name)


def test_the_state_is_float32_in_a_model_of_16_bits():
    cache = delta_net.init_cache(SPEC, B, T, "bfloat16")
    assert {name: leaf.dtype.name for name, leaf in cache.items()} == {"conv": "bfloat16", "state": "float32"}
    assert {row.name for row in SPEC.parameters(D) if row.float32} == {"delta_decay", "delta_step"}
