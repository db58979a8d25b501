"""Layers of up to 8 tokens on an H100 or H200: `JAX_PLATFORMS=cuda pytest -m gpu -s -k gpu_few_tokens`.

Fresh random inputs each run; pages that nobody owns are NaN, and so is the memory that results are written to.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora_steps import hopper_few_tokens
from support.gpu import poison, require
from support.paged import (
    PagedLayer,
    PagedSpec,
    assert_base_rows_exact_and_mixed_equals_solo,
    assert_wrong_slots_are_base_rows,
    draw_layer,
    wide,
)

pytestmark = pytest.mark.gpu("hopper")

TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2}
RANKS = (4, 8, 16, 17, 32, 64, 100, 128)
SPECS = {
    "1 token": PagedSpec(1, 2048, 768, 128, 8, slots=8, ranks=(40,), base_rows=0.0),
    "3 tokens": PagedSpec(3, 2048, 768, 128, 8, slots=8, ranks=RANKS),
    "8 tokens": PagedSpec(8, 2048, 768, 128, 8, slots=8, ranks=RANKS),
    # A bank of 256 slots and 256 experts would take minutes to draw.
    "8 tokens of 256 slots": PagedSpec(8, 256, 192, 9, 8, slots=256, ranks=(16, 64), empty_slots=3),
    "8 tokens of 256 experts": PagedSpec(8, 256, 192, 256, 8, slots=2, ranks=(16, 64)),
    "7 tokens on one expert": PagedSpec(7, 320, 448, 4, 3, slots=2, routing="one", dtype="float16"),
    "8 base rows": PagedSpec(8, 256, 192, 8, 2, base_rows=1.0),
    "one expert, one slot": PagedSpec(5, 128, 64, 1, 1, slots=1, ranks=(128,)),
}


@pytest.fixture(scope="module", params=SPECS)
def layer(request) -> PagedLayer:
    require("hopper")
    return draw_layer(SPECS[request.param], np.random.default_rng())


@pytest.mark.parametrize("adapters", [True, False])
def test_the_layer_equals_the_oracle(layer, adapters):
    drawn = layer if adapters else replace(layer, matrices={})
    poison()
    y = wide(layer.function("hopper")(layer.slots, layer.adapters if adapters else None))
    expected = drawn.expected(np.arange(layer.spec.tokens))
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    print(f"\nrelative error {error:.2e}, max abs {np.abs(y - expected).max():.2e}")
    assert error <= TOLERANCE[layer.spec.dtype]


def test_base_rows_are_exact_and_mixed_equals_solo(layer):
    poison()
    assert_base_rows_exact_and_mixed_equals_solo(layer, "hopper")
    assert_wrong_slots_are_base_rows(layer, "hopper")


def test_skipped_pairs_and_tokens_reach_nothing(layer):
    """A token's other experts keep their bits; a skipped token has zeros, whatever its row holds."""
    tokens, experts = layer.spec.tokens, layer.spec.experts
    half = replace(layer, chosen=layer.chosen.at[0, 0].set(experts), gates=layer.gates.at[0, 0].set(0))
    zero_weight = replace(layer, gates=half.gates)
    y = half.function("hopper")(layer.slots, layer.adapters)
    poison()
    assert bool((y == zero_weight.function("hopper")(layer.slots, layer.adapters)).all())
    gone = replace(layer, chosen=layer.chosen.at[-1].set(-1), x=layer.x.at[-1].set(jnp.nan))
    poison()
    y = gone.function("hopper")(layer.slots, layer.adapters)
    assert not bool(y[-1].any())
    full = layer.function("hopper")(layer.slots, layer.adapters)
    assert bool((y[: tokens - 1] == full[: tokens - 1]).all())


def test_the_layer_has_the_bits_of_the_sorted_plan(layer, monkeypatch):
    few = layer.function("hopper")(layer.slots, layer.adapters)
    monkeypatch.setattr(hopper_few_tokens, "runs", lambda plan: False)
    jax.clear_caches()  # of traces with the kernel
    assert bool((layer.function("hopper")(layer.slots, layer.adapters) == few).all())
