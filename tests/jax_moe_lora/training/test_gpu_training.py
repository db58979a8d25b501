"""A training step on a GPU, by the kernels and cuDNN: packed rows, three layouts, and the same bits twice."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_moe_lora.benchmark.models import model_config
from jax_moe_lora.models.decoder import layer_sites
from jax_moe_lora.models.params import init_params
from jax_moe_lora.training import AdapterSpec, Batch, init_state, make_step
from jax_moe_lora.training import init_params as new_adapter

pytestmark = pytest.mark.gpu("hopper")

WIDE = model_config("qwen3-30b-a3b", 2)
# Every token goes to every expert: rounding cannot send it elsewhere.
MLP = replace(WIDE.layers[0].mlp, moe=replace(WIDE.moe, num_experts=4, top_k=4))
CONFIG = replace(WIDE, vocab_size=512, layers=tuple(replace(layer, mlp=MLP) for layer in WIDE.layers))
SPECS = {
    "fused": AdapterSpec(rank=4),
    "per-expert": AdapterSpec(rank=18, layout="per-expert", targets=("gate", "down", "q", "v", "router")),
    "shared-outer": AdapterSpec(rank=40, layout="shared-outer", targets=("gate", "up", "down", "o")),
}
ROWS, LENGTH = 6, 256  # several blocks of attention's backward pass


def packed_batch() -> Batch:
    """Two examples of other adapters in each row, then padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1))
    index = np.arange(LENGTH)[None, :]
    first, last = rng.integers(8, 30, (ROWS, 1)), rng.integers(40, LENGTH, (ROWS, 1))
    segments = np.where(index < first, 1, np.where(index < last, 2, 0))
    slots = np.where(segments == 1, np.arange(ROWS)[:, None] % 3, (np.arange(ROWS)[:, None] + 1) % 3)
    ints = (tokens[:, :-1], np.where(index < first, index, index - first), segments, slots, tokens[:, 1:])
    return Batch(*(jnp.asarray(v, jnp.int32) for v in ints), jnp.asarray(rng.random((ROWS, LENGTH)) < 0.7, jnp.float32))


def gradients(dtype: str, implementation: str | None) -> dict[str, dict[str, np.ndarray]]:
    """Of each adapter, as what one step of SGD takes away."""
    sites, keys = layer_sites(CONFIG), jax.random.split(jax.random.key(1), len(SPECS))
    params = {}
    for key, (name, spec) in zip(keys, SPECS.items(), strict=True):
        fresh = new_adapter(spec, sites, key)
        # B is not zero, so that A has a gradient; all are rounded, so that every dtype has the same ones.
        drawn = {k: v if k.endswith(".a") else 0.05 * jax.random.normal(key, v.shape) for k, v in fresh.items()}
        params[name] = {k: v.astype(jnp.bfloat16).astype(jnp.float32) for k, v in drawn.items()}
    before = jax.device_get(params)
    optimizers = {name: optax.sgd(1.0) for name in SPECS}
    weights = init_params(CONFIG, jax.random.key(0), "bfloat16")
    model = jax.tree.map(lambda v: v.astype(dtype), weights)
    step = make_step(CONFIG, SPECS, optimizers, implementation=implementation)  # type: ignore[arg-type]
    state, metrics = step(init_state(params, optimizers), model, packed_batch())
    assert np.isfinite(np.asarray(metrics.losses.loss)).all()
    return jax.tree.map(lambda old, new: old - np.asarray(new), before, jax.device_get(state.params))


def errors(found, expected) -> np.ndarray:
    relative = lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b)  # noqa: E731
    return np.asarray(jax.tree.leaves(jax.tree.map(relative, found, expected)))


def test_a_training_step_by_kernels_is_as_close_to_float32_as_one_through_xla():
    expected = gradients("float32", "xla")
    kernels, xla = gradients("bfloat16", None), gradients("bfloat16", "xla")
    own, others = errors(kernels, expected), errors(xla, expected)
    print(f"\nrelative errors: kernels {own.max():.1e}, XLA {others.max():.1e}")
    assert own.max() < 3e-2
    assert (own < 1.5 * others + 2e-3).all()
    for one, other in zip(jax.tree.leaves(kernels), jax.tree.leaves(gradients("bfloat16", None)), strict=True):
        np.testing.assert_array_equal(one, other)
