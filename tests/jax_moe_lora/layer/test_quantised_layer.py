"""The layer over quantised experts is the layer over their dequantised form, bit for bit, and keeps its promises."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer.linear import dense_plan, lora_linear
from jax_moe_lora.layer.moe import moe_lora
from jax_moe_lora.nn import moe_sites
from pallas_kernels import backend
from pallas_kernels.errors import NotDifferentiable
from pallas_kernels.ops import ExpertWeights, Quantised, UnsupportedImplementation, choose, dequantise, pack, quantise
from pallas_kernels.quantised import tiles
from pallas_kernels.quantised.format import FORMATS, FP8_BLOCK, MXFP4
from support.layers import LAYER, Spec, assert_close, draw

pytestmark = pytest.mark.optimised

SPEC = Spec(tokens=16, hidden=64, width=64, experts=4, top_k=2, slots=3, max_rank=16)
ADAPTERS = (("per_expert", 4), ("shared_outer", 8))


@pytest.fixture(scope="module")
def problem():
    return draw(replace(SPEC, dtype="bfloat16", adapters=ADAPTERS))


def experts(problem, format) -> ExpertWeights:
    matrices = {name: jnp.asarray(getattr(problem, name), problem.spec.dtype) for name in ("gate", "up", "down")}
    return ExpertWeights(**{name: quantise(matrix, format) for name, matrix in matrices.items()})


def dequantised(weights: ExpertWeights, dtype) -> ExpertWeights:
    arrays = {name: dequantise(w, dtype) for name, w in vars(weights).items() if isinstance(w, Quantised)}
    return ExpertWeights(**arrays)


def run(problem, weights, slots=None, bank=True, used=None):
    x, router = (jnp.asarray(w, problem.spec.dtype) for w in (problem.x, problem.router))
    slots = jnp.asarray(problem.slots if slots is None else slots, jnp.int32)
    pages = (used or problem.bank).layer(0) if bank else None
    y = LAYER(x, router, weights, problem.spec.config, pages, slots, implementation="xla")
    return np.asarray(y.astype(jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize(("format", "dtype"), [*((name, "bfloat16") for name in FORMATS), ("fp8_block", "float32")])
def test_a_layer_over_quantised_experts_is_the_one_over_dequantised_ones(problem, format, dtype):
    if dtype != problem.spec.dtype:
        problem = draw(replace(problem.spec, dtype=dtype))
    weights = experts(problem, format)
    found = run(problem, weights)
    assert (found == run(problem, dequantised(weights, problem.spec.dtype))).all()
    plain = ExpertWeights(*(jnp.asarray(w, problem.spec.dtype) for w in (problem.gate, problem.up, problem.down)))
    assert (found != run(problem, plain)).any(), "the weights that are compared must differ"


@pytest.mark.slow
def test_gradients_of_rows_and_adapters_are_those_over_dequantised_experts(problem):
    weights, dtype = experts(problem, MXFP4), problem.spec.dtype
    x, router = (jnp.asarray(w, dtype) for w in (problem.x, problem.router))
    bank, slots = problem.bank.layer(0), jnp.asarray(problem.slots, jnp.int32)

    @jax.jit
    def gradients(x, pools, weights):
        def loss(x, pools):
            pages = replace(bank, pools=pools)
            y = moe_lora(x, router, weights, problem.spec.config, pages, slots, implementation="xla")
            return (y.astype(jnp.float32) ** 2).sum()

        return jax.grad(loss, argnums=(0, 1))(x, pools)

    found = jax.tree.leaves(gradients(x, bank.pools, weights))
    expected = jax.tree.leaves(gradients(x, bank.pools, dequantised(weights, dtype)))
    assert found[0].any()
    assert any(pool.any() for pool in found[1:])
    for one, other in zip(found, expected, strict=True):
        assert (one == other).all()


@pytest.mark.slow
def test_base_rows_mixed_rows_and_runs_keep_their_bits_over_quantised_experts(problem):
    weights = experts(problem, FP8_BLOCK)
    mixed, nobody = run(problem, weights), np.full(problem.spec.tokens, -1)
    base = run(problem, weights, bank=False)
    assert {-1, 0, 1} <= set(problem.slots.tolist())
    assert (mixed[problem.slots == -1] == base[problem.slots == -1]).all()
    assert (run(problem, weights, nobody) == base).all()
    assert (mixed == run(problem, weights)).all()
    for slot in (0, 1):
        solo = run(problem, weights, np.where(problem.slots == slot, slot, -1))
        assert (solo[problem.slots == slot] == mixed[problem.slots == slot]).all()
        assert (mixed[problem.slots == slot] != base[problem.slots == slot]).any()


@pytest.mark.slow
def test_shared_matrices_and_zero_adapters_keep_their_bits_over_quantised_experts(problem):
    weights, bank, spec = experts(problem, FP8_BLOCK), problem.bank, problem.spec
    shared = problem.adapters[1]
    apart = {
        key: replace(w, a=np.repeat(w.a, spec.experts // len(w.a), 0), b=np.repeat(w.b, spec.experts // len(w.b), 0))
        for key, w in shared.weights.items()
    }
    assert any(len(w.a) == 1 or len(w.b) == 1 for w in shared.weights.values())
    replicated = create_bank(moe_sites(spec.config), spec.slots, spec.max_rank, None, spec.dtype)
    for slot, adapter in enumerate((problem.adapters[0], replace(shared, weights=apart))):
        replicated = insert(replicated, slot, adapter)
    assert (run(problem, weights, used=replicated) == run(problem, weights)).all()
    zeros = replace(bank, pools=tuple(jnp.zeros_like(pool) for pool in bank.pools))
    x, router = (jnp.asarray(w, problem.spec.dtype) for w in (problem.x, problem.router))
    slots = jnp.asarray(problem.slots, jnp.int32)
    found = LAYER(x, router, weights, problem.spec.config, zeros.layer(0), slots)
    assert (np.asarray(found.astype(jnp.float32)) == run(problem, weights, bank=False)).all()
    assert (np.asarray(found.astype(jnp.float32)) != run(problem, weights)).any()


@pytest.mark.parametrize("format", ["fp8_block", "int4_zero"])
def test_a_projection_of_several_tiles_is_that_of_one(format, monkeypatch):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((9, 64), (160, 64)))
    weight = quantise(w, format)
    numbers = dequantise(weight, jnp.float32)

    def both(weight):
        return jax.jit(jax.value_and_grad(lambda x: (lora_linear(x, weight) ** 2).sum()))(x)

    assert (lora_linear(x, weight) == lora_linear(x, numbers)).all()
    expected = both(numbers)
    monkeypatch.setattr(tiles, "TILE_VALUES", 64 * 48)  # tiles of 48 rows, or of a block of 128, and one of the rest
    assert tiles.tile_rows(weight) == (128 if format == "fp8_block" else 48)
    found = both(weight)
    for one, other in zip(found, expected, strict=True):
        assert_close(np.asarray(one), np.asarray(other), 1e-6)


def test_a_projection_needs_room_for_a_tile_and_not_for_the_weight(monkeypatch):
    monkeypatch.setattr(tiles, "TILE_VALUES", 2**14)
    weight = jax.eval_shape(lambda: quantise(jnp.zeros((4096, 256)), FP8_BLOCK))
    x = jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)
    gradient = jax.grad(lambda x, w: lora_linear(x, w).sum())
    for function in (lora_linear, gradient):
        memory = jax.jit(function).lower(x, weight).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4096 * 256 / 2, "a whole copy in 16 bits takes four times this"


@pytest.mark.slow
@pytest.mark.parametrize("format", ["mxfp4", "fp8_block"])
def test_a_layer_and_its_gradients_need_no_copy_of_the_experts(format):
    spec = Spec(tokens=4, hidden=128, width=128, experts=64, top_k=2, slots=1, max_rank=16, dtype="bfloat16")
    weight = jax.eval_shape(lambda: quantise(jnp.zeros((64, 128, 128)), format))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4, 128), (64, 128))]

    def loss(x, router, experts):
        return moe_lora(x, router, experts, spec.config).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss)).lower(*arrays, ExpertWeights(weight, weight, weight)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 128 * 128 * 2


def test_adapters_of_a_quantised_projection_are_those_over_its_dequantised_form(problem):
    pages = problem.bank.layer(0).get("router")
    x = jnp.asarray(problem.x, problem.spec.dtype)
    plan = dense_plan(jnp.asarray(problem.slots, jnp.int32), problem.spec.slots)
    weight = quantise(jnp.asarray(np.random.default_rng(0).standard_normal((4, 64)), jnp.float32), "mxfp4")
    found = lora_linear(x, weight, None, pages, plan)
    assert (found == lora_linear(x, dequantise(weight, x.dtype), None, pages, plan)).all()


def test_quantised_weights_are_frozen():
    weight = quantise(jnp.ones((8, 64)), FP8_BLOCK)
    with pytest.raises(NotDifferentiable, match="frozen; train adapters"):
        jax.grad(lambda scales: lora_linear(jnp.ones((2, 64)), replace(weight, scales=scales)).sum())(weight.scales)
    spec = SPEC
    matrices = quantise(jnp.ones((4, 64, 64)), FP8_BLOCK)

    def layer(scales):
        gate = replace(matrices, scales=scales)
        experts = ExpertWeights(gate, matrices, matrices)
        return moe_lora(jnp.ones((2, 64)), jnp.ones((4, 64)), experts, spec.config).sum()

    with pytest.raises(NotDifferentiable, match="Quantised experts have no gradient"):
        jax.grad(layer)(matrices.scales)


def test_a_quantised_weight_of_another_shape_is_refused_by_name():
    with pytest.raises(InputError, match=r"x has shape \[2, 32\]; expected \[T, 64\]"):
        lora_linear(jnp.ones((2, 32)), quantise(jnp.ones((8, 64)), "mxfp4"))
    good = quantise(jnp.ones((4, 64, 64)), "mxfp4")
    with pytest.raises(InputError, match=r"gate is mxfp4 of shape \[64, 64\]; expected \[4, 64, 64\]"):
        moe_lora(jnp.ones((2, 64)), jnp.ones((4, 64)), ExpertWeights(good[0], good, good), SPEC.config)


def test_kernels_say_which_quantised_weights_they_read(monkeypatch):
    def on(*capability: int):
        monkeypatch.setattr(backend, "device_capability", lambda: (capability, f"compute capability {capability}"))

    packed = replace(MXFP4, layout="hopper")
    on(8, 0)
    choice = choose(widths=(64, 64), operands=(MXFP4, FP8_BLOCK))
    assert choice.picked == "xla"
    assert "no kernels for weights in fp8_block, mxfp4" in choice.why_not["portable"]
    with pytest.raises(UnsupportedImplementation, match="no kernels for weights in mxfp4, which 'xla' dequantises"):
        choose("portable", widths=(64, 64), operands=(MXFP4,))
    on(9, 0)
    assert choose(widths=(64, 64), operands=(packed, "bfloat16")).picked == "hopper"
    with pytest.raises(
        UnsupportedImplementation, match="weights that `pack` has packed for it, these are mxfp4 in rows"
    ):
        choose("hopper", widths=(64, 64), operands=(MXFP4,))
    with pytest.raises(
        UnsupportedImplementation, match="makes bfloat16 of quantised weights, and the rows are float16"
    ):
        choose("hopper", dtype="float16", widths=(64, 64), operands=(packed,))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["fp8_block", "mxfp4", "int4_zero"])
def test_a_layer_over_packed_experts_is_the_one_over_those_in_rows(format):
    """Through XLA, which runs where the Hopper kernels cannot."""
    problem = draw(replace(SPEC, hidden=128, width=128, dtype="bfloat16", adapters=ADAPTERS))
    in_rows = experts(problem, format)
    if format == "int4_zero":  # packed scales are bfloat16
        rounded = {
            name: replace(w, scales=w.scales.astype(jnp.bfloat16).astype(jnp.float32))
            for name, w in vars(in_rows).items()
            if w is not None
        }
        in_rows = ExpertWeights(**rounded)
    packed = ExpertWeights(*(pack(weight) for weight in (in_rows.gate, in_rows.up, in_rows.down)))
    assert (run(problem, packed) == run(problem, in_rows)).all()


@pytest.mark.parametrize("format", ["fp8_block", "mxfp4"])
def test_a_packed_projection_of_several_tiles_is_the_one_in_rows(format, monkeypatch):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((9, 128), (320, 128)))
    weight = quantise(w, format)
    monkeypatch.setattr(tiles, "TILE_VALUES", 128 * 128)
    packed = pack(weight)
    assert tiles.tile_rows(packed) == 128
    assert (lora_linear(x, packed) == lora_linear(x, weight)).all()
