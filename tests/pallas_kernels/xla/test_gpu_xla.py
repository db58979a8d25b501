"""The XLA backend on an NVIDIA GPU: `JAX_PLATFORMS=cuda pytest -m gpu -s tests/pallas_kernels/xla`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import LoRAAdapter, uniform
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.layer import reference
from jax_moe_lora.layer.moe import moe_lora, routed_experts
from jax_moe_lora.nn import moe_sites
from pallas_kernels.routed_experts.weights import ExpertWeights

pytestmark = pytest.mark.gpu

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
SHAPES = {
    "tiny": (MoEConfig(64, 32, 8, 2, renormalize=True), 33),
    "odd": (MoEConfig(192, 320, 5, 3), 70),
    "qwen3-30b-a3b": (MoEConfig(2048, 768, 128, 8, renormalize=True), 16),
}
RANKS = (4, 16, 40)


def problem(config: MoEConfig, tokens: int, dtype: str):
    """Random weights, rows, adapters of mixed ranks and slots with base rows, all rounded to `dtype`."""
    rng = np.random.default_rng()
    sites = moe_sites(config)

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return np.asarray(jnp.asarray(scale * rng.normal(size=shape), dtype).astype(jnp.float32))

    d, f, e = config.hidden_size, config.expert_width, config.num_experts
    x, router = draw(tokens, d), draw(e, d)
    weights = [draw(e, f, d, scale=d**-0.5), draw(e, f, d, scale=d**-0.5), draw(e, d, f, scale=f**-0.5)]
    bank = create_bank(sites, len(RANKS) + 1, max(RANKS), None, dtype)
    adapters = []
    for slot, rank in enumerate(RANKS):
        sides = {
            name: (
                draw(1 if slot == 1 else s.num_experts, rank, s.in_width, scale=s.in_width**-0.5),
                draw(s.num_experts, s.out_width, rank, scale=rank**-0.5),
            )
            for name, s in sites.items()
            if name != "router"
        }
        loaded = {(0, n): uniform(a, b, 0.5, sites[n].num_experts) for n, (a, b) in sides.items()}
        bank = insert(bank, slot, LoRAAdapter(str(slot), loaded), donate=True)
        adapters.append({n: (a, b, 0.5) for n, (a, b) in sides.items()})
    slots = rng.integers(-1, len(RANKS), tokens).astype(np.int32)
    return x, router, weights, bank, adapters, slots


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_equals_the_oracle(shape, dtype):
    config, tokens = SHAPES[shape]
    x, router, weights, bank, adapters, slots = problem(config, tokens, dtype)
    layer = jax.jit(partial(moe_lora, implementation="xla"), static_argnames="config")
    cast = [jnp.asarray(w, dtype) for w in weights]
    arguments = (jnp.asarray(x, dtype), jnp.asarray(router, dtype), ExpertWeights(*cast), config)
    mixed = layer(*arguments, bank.layer(0), jnp.asarray(slots))
    base = layer(*arguments)
    expected = reference.moe_lora(
        x,
        router,
        *weights,
        [None if s < 0 else adapters[s] for s in slots],
        top_k=config.top_k,
        renormalize=config.renormalize,
    )
    actual = np.asarray(mixed.astype(jnp.float32))
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    print(f"\n{jax.devices()[0].device_kind} {shape} {dtype}: relative Frobenius error {error:.2e}")
    assert error <= TOLERANCE[dtype]
    assert bool((mixed[slots < 0] == base[slots < 0]).all()), "base rows changed"
    for slot in range(len(RANKS)):
        solo = layer(*arguments, bank.layer(0), jnp.where(jnp.asarray(slots) == slot, slot, -1))
        assert bool((solo[slots == slot] == mixed[slots == slot]).all()), f"mixed differs from solo in slot {slot}"


def test_thousand_replays_have_equal_bits():
    config, tokens = SHAPES["tiny"]
    x, router, weights, bank, _, slots = problem(config, tokens, "bfloat16")
    chosen = jax.lax.top_k(jnp.asarray(x @ router.T), config.top_k)[1]
    layer = jax.jit(partial(routed_experts, implementation="xla"), static_argnames="config")
    cast = ExpertWeights(*[jnp.asarray(w, jnp.bfloat16) for w in weights])
    even = jnp.full(chosen.shape, 0.5)
    arguments = (jnp.asarray(x, jnp.bfloat16), even, chosen, cast, config, bank.layer(0), jnp.asarray(slots))
    first = layer(*arguments)
    assert all(bool((layer(*arguments) == first).all()) for _ in range(1000))
