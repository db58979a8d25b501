"""A decode step of attention whose heads go through one kernel, against the same step through XLA."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.models.blocks import gqa, token_heads
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.parameter import Norm
from jax_moe_lora.models.steps import make_step
from pallas_kernels.pages import NO_ADAPTERS
from support.layers import assert_close

WIDTH, POSITIONS = 32, 10
SPEC = GQA(4, 4, 64, RopeConfig(), qk_norm="head", norm=Norm(1e-6))
LENGTHS = np.array([3, POSITIONS, 9], np.int32)  # the second request is full


def make_token_step(implementation: str | None):
    lengths = jnp.asarray(LENGTHS)
    live = (lengths < POSITIONS)[:, None]
    return make_step("token", lengths[:, None], live, jnp.full(3, -1), None, implementation, lengths)


def decode(spec: GQA, implementation: str | None):
    """The mixed rows and the cache after a step; weights, rows and cache are the same in each call."""
    rng = np.random.default_rng(0)

    def draw(*shape: int):
        return jnp.asarray(rng.normal(size=shape), "bfloat16")

    shapes = {row.name: row.shape for row in spec.parameters(WIDTH)}
    weights = {name: draw(*shape) for name, shape in shapes.items()}
    cache = {side: draw(*leaf.shape) for side, leaf in gqa.init_cache(spec, 3, POSITIONS, "bfloat16").items()}
    return gqa.forward(spec, weights, NO_ADAPTERS, draw(3, 1, WIDTH), make_token_step(implementation), cache)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr("pallas_kernels.backend.device_capability", lambda: ((9, 0), "compute capability 9.0"))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@pytest.mark.parametrize(
    "change", [{}, {"window": 4, "qk_norm": None, "biases": "qkv"}, {"gate": "projection"}], ids=str
)
def test_a_step_in_one_kernel_is_the_step_through_xla(change, on_hopper, monkeypatch):
    spec, calls = replace(SPEC, **change), []
    original = token_heads.token_heads
    monkeypatch.setattr(gqa, "token_heads", lambda *arguments: calls.append(1) or original(*arguments))
    found, expected = decode(spec, None), decode(spec, "xla")
    assert len(calls) == 1
    for result, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(result, wanted, 1e-2)


@pytest.mark.parametrize(
    "change",
    [
        {"rope": None},
        {"rope": RopeConfig(rotary_dim=32)},
        {"rope": RopeConfig(interleaved=True)},
        {"qk_norm": "projection"},
        {"qk_norm_last": True},
        {"clip": 1.0},
        {"gate": "q"},
        {"num_kv_heads": 2},
    ],
    ids=str,
)
def test_blocks_of_another_form_stay_with_xla(change, on_hopper):
    def runs(spec: GQA, dtype: str = "bfloat16") -> bool:
        rows = tuple(jnp.zeros((3, heads * spec.head_dim)) for heads in (spec.num_heads, *2 * [spec.num_kv_heads]))
        cache = gqa.init_cache(spec, 3, POSITIONS, "bfloat16")
        return token_heads.in_one_kernel(spec, rows, jnp.dtype(dtype), cache, make_token_step(None))

    assert runs(SPEC)
    assert not runs(SPEC, "float16")  # the cache has another dtype
    assert not runs(replace(SPEC, **change))
