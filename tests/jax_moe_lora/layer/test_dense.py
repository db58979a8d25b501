"""The packed form of multi-LoRA on dense projections, against the tile loop, on any device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.layer.linear import Projection, dense_plan, lora_linear, lora_linears
from jax_moe_lora.layer.packed_update import MAX_PACKED_RANKS, packed_update, packs
from pallas_kernels.ops import RANK_PAGE, LoRAPages
from pallas_kernels.xla.dot import matmul_t

pytestmark = pytest.mark.optimised

RANKS = (4, 0, 40, 16, 33)  # of the slots; 0: an empty one
IN, OUT = 48, 80
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def draw_pages(dtype: str, rng: np.random.Generator) -> LoRAPages:
    """Adapters of mixed ranks with a NaN page between any two."""
    table, pools = np.zeros((len(RANKS), 1, 4), np.int32), {"a": [np.zeros((1, 16, IN))], "b": [np.zeros((1, 16, OUT))]}
    for slot, rank in enumerate(RANKS):
        count = -(-rank // RANK_PAGE)
        for width, pool in ((IN, pools["a"]), (OUT, pools["b"])):
            pool.append(np.full((1, 16, width), np.nan))
            first = sum(len(pages) for pages in pool)
            matrix = np.zeros((count * RANK_PAGE, width))
            matrix[:rank] = rng.normal(size=(rank, width)) * width**-0.5
            pool.append(matrix.reshape(count, RANK_PAGE, width))
            table[slot, 0, 0 if width == IN else 1] = first if rank else 0
        table[slot, 0, 2:] = count, rank
    a, b = (jnp.asarray(np.concatenate(pools[side]), dtype) for side in "ab")
    scale = jnp.asarray(rng.uniform(0.5, 2, (len(RANKS), 1)), jnp.float32)
    return LoRAPages(a, b, jnp.asarray(table), scale, max(RANKS))


@jax.jit
def packed(x, weight, pages, slots):
    return matmul_t(x, weight) + packed_update(x, pages, slots)


@pytest.fixture(params=[(3, "float32"), (3, "bfloat16"), (29, "float32"), (29, "bfloat16")], ids=str)
def case(request):
    """Fewer rows than slots, and more."""
    tokens, dtype = request.param
    rng = np.random.default_rng()
    x, weight = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((tokens, IN), (OUT, IN)))
    slots = jnp.asarray(rng.permutation(np.arange(tokens) % (len(RANKS) + 1)) - 1, jnp.int32)
    return x, weight, draw_pages(dtype, rng), slots


def test_packed_equals_the_tile_loop(case):
    x, weight, pages, slots = case
    loop = jax.jit(partial(lora_linear, implementation="xla"))
    expected = loop(x, weight, None, pages, dense_plan(slots, len(RANKS)))
    error = jnp.linalg.norm(packed(x, weight, pages, slots) - expected) / jnp.linalg.norm(expected)
    assert float(error) < TOLERANCE[str(x.dtype)]


def test_base_rows_and_rows_out_of_range_have_the_base_bits(case):
    x, weight, pages, slots = case
    base = jax.jit(matmul_t)(x, weight)
    mixed = packed(x, weight, pages, slots)
    nobody = np.asarray((slots < 0) | (slots == RANKS.index(0)))
    np.testing.assert_array_equal(mixed[nobody], base[nobody])
    for wrong in (len(RANKS), 10**9, -7):
        np.testing.assert_array_equal(packed(x, weight, pages, jnp.full_like(slots, wrong)), base)


def test_mixed_equals_solo(case):
    x, weight, pages, slots = case
    mixed = packed(x, weight, pages, slots)
    for slot in range(len(RANKS)):
        own = np.asarray(slots == slot)
        solo = packed(x, weight, pages, jnp.where(slots == slot, slots, -1))
        np.testing.assert_array_equal(solo[own], mixed[own])


def test_the_form_follows_from_shapes_dtype_and_device(monkeypatch):
    pages = draw_pages("bfloat16", np.random.default_rng())
    x = jnp.zeros((8, IN), jnp.bfloat16)
    assert not packs(x, pages, None)  # no GPU here
    monkeypatch.setattr("pallas_kernels.backend.device_capability", lambda: ((9, 0), "compute capability 9.0"))
    assert packs(x, pages, None)
    assert not packs(x, pages, "xla")
    many = MAX_PACKED_RANKS // RANK_PAGE + 1
    wide = LoRAPages(pages.a, pages.b, jnp.zeros((many, 1, 4), jnp.int32), jnp.zeros((many, 1)), 16)
    assert packs(x, wide, None)  # eight rows meet at most eight adapters
    assert not packs(jnp.zeros((many, IN), jnp.bfloat16), wide, None)


@pytest.mark.parametrize("form", ["packed", "loop"])
@pytest.mark.parametrize("merged", [True, False])
def test_projections_of_the_same_rows_have_the_bits_that_each_has_alone(form, merged, monkeypatch):
    monkeypatch.setattr("jax_moe_lora.layer.linear.packs", lambda *_: form == "packed")
    monkeypatch.setattr("jax_moe_lora.layer.linear.MAX_MERGED_BYTES", 2**25 if merged else 0)
    rng = np.random.default_rng()
    x = jnp.asarray(rng.normal(size=(29, IN)), "bfloat16")
    slots = jnp.asarray(np.arange(29) % (len(RANKS) + 1) - 1, jnp.int32)
    weights = [jnp.asarray(rng.normal(size=(OUT, IN)), "bfloat16") for _ in range(3)]
    bias, pages, plan = jnp.asarray(rng.normal(size=OUT), "bfloat16"), draw_pages("bfloat16", rng), dense_plan(slots, 5)
    three = [Projection(weights[0], bias, pages), Projection(weights[1]), Projection(weights[2], None, pages)]
    together = jax.jit(lambda x, plan: lora_linears(x, three, plan))(x, plan)
    alone = jax.jit(lambda x, plan: [lora_linear(x, one.weight, one.bias, one.pages, plan) for one in three])(x, plan)
    without = jax.jit(lambda x: lora_linears(x, [Projection(one.weight, one.bias) for one in three]))(x)
    for result, expected, base in zip(together, alone, without, strict=True):
        np.testing.assert_array_equal(result, expected)
        np.testing.assert_array_equal(result[slots < 0], base[slots < 0])
