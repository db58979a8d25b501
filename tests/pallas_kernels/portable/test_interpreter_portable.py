"""The portable kernels in jax's GPU interpreter, with race detection, on small shapes. No GPU is needed.

Memory that a kernel has not written reads as NaN there, and so do pages that nobody owns. `plgpu.mma` has no rule for a
CPU, so these tests give it one.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.interpreters import mlir
from support.paged import PagedLayer, PagedSpec, draw_layer, replicated
from test_interpreter import expected

from pallas_kernels import backend
from pallas_kernels.grouped_matmul import portable
from pallas_kernels.ops import UnsupportedImplementation, choose, grouped_matmul, make_plan
from pallas_kernels.portable.tuning import RESERVED_BYTES, SMEM_BYTES, TILE_ROWS, heuristic, smem_bytes, tile_rows

TOLERANCE = {"bfloat16": 1e-2, "float16": 2e-3}
SPEC = PagedSpec(14, 128, 192, 3, 2, slots=4, ranks=(4, 16, 17, 40))


def multiply_on_cpu(acc: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """16 elements of K at a time, in float32, as the instruction does."""
    for k in range(0, a.shape[1], 16):
        acc = acc + jnp.dot(a[:, k : k + 16].astype(jnp.float32), b[k : k + 16].astype(jnp.float32))
    return acc


OPERANDS = jnp.zeros((16, 8)), jnp.zeros((16, 16), "bfloat16"), jnp.zeros((16, 8), "bfloat16")
MMA = jax.make_jaxpr(plgpu.mma)(*OPERANDS).eqns[0].primitive  # jax exports the function alone
mlir.register_lowering(MMA, mlir.lower_fun(multiply_on_cpu, multiple_results=False), platform="cpu")


@pytest.fixture(scope="module")
def layer() -> PagedLayer:
    return draw_layer(SPEC, np.random.default_rng(0))


@pytest.fixture(autouse=True)
def interpreter(capfd):
    """Fails where the interpreter reports a race: it prints and goes on."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        yield
    assert "RACE DETECTED" not in capfd.readouterr().out


def run(layer: PagedLayer, modules: tuple[str, ...], slots=None, adapters=None) -> np.ndarray:
    """One projection's rows by pair `[P, out]`."""
    spec = layer.spec
    used = layer.adapters if adapters is None else adapters
    plan = make_plan(layer.chosen, layer.slots if slots is None else slots, spec.experts, spec.slots, "portable")
    weights = tuple(getattr(layer.experts, m) for m in modules)
    x = jax.random.normal(jax.random.key(0), (spec.tokens, weights[0].shape[2]), spec.dtype)
    pages = tuple(used.get(m) for m in modules)
    rows = portable.grouped_matmul(x, weights, plan, True, pages, "silu")
    return np.asarray(rows.astype(jnp.float32))[np.asarray(plan.position)]


@pytest.mark.slow
@pytest.mark.parametrize("modules", [("gate", "up"), ("down",)], ids="+".join)
def test_matmul_shrink_and_expand_equal_the_oracle_without_races(layer, modules):
    actual, wanted = run(layer, modules), expected(layer, modules)
    assert np.linalg.norm(actual - wanted) / np.linalg.norm(wanted) < TOLERANCE["bfloat16"]
    base = np.repeat(np.asarray(layer.slots) < 0, layer.spec.top_k)
    assert base.any()
    np.testing.assert_array_equal(actual[base], run(layer, modules, adapters={})[base])


@pytest.mark.slow
@pytest.mark.parametrize("modules", [("gate", "up"), ("down",)], ids="+".join)
def test_biases_and_clamped_swiglu_equal_the_reference_without_races(layer, modules):
    spec, gated = layer.spec, len(modules) == 2
    plan = make_plan(layer.chosen, layer.slots, spec.experts, spec.slots, "portable")
    weights, pages = (tuple(each[m] for m in modules) for each in (vars(layer.experts), layer.adapters))
    keys = jax.random.split(jax.random.key(3), 3)
    x = 2 * jax.random.normal(keys[0], (spec.tokens, weights[0].shape[2]), spec.dtype)
    biases = [4 * jax.random.normal(key, w.shape[:2], spec.dtype) for key, w in zip(keys[1:], weights, strict=False)]
    found = portable.grouped_matmul(x, weights, plan, True, pages, "clamped_swiglu", biases=tuple(biases))
    options = {"of_tokens": True, "biases": biases, "adapters": pages, "activation": "clamped_swiglu"}
    own = weights if gated else weights[0]
    wanted = grouped_matmul(x, own, plan, **options, implementation="reference")
    one, other = (np.asarray(rows.astype(jnp.float32))[np.asarray(plan.position)] for rows in (found, wanted))
    assert np.linalg.norm(one - other) / np.linalg.norm(other) < TOLERANCE["bfloat16"]


@pytest.mark.slow
def test_float16_and_tiles_of_64_rows_that_do_not_fill_up():
    """120 pairs of two experts: 64 rows a tile; more steps of K than the ring has stages."""
    layer = draw_layer(PagedSpec(120, 320, 64, 2, 1, ranks=(20,), dtype="float16"), np.random.default_rng(1))
    assert tile_rows(120, 2) == 64
    actual, wanted = run(layer, ("gate", "up")), expected(layer, ("gate", "up"))
    assert np.linalg.norm(actual - wanted) / np.linalg.norm(wanted) < TOLERANCE["float16"]


@pytest.mark.slow
def test_mixed_equals_solo_and_shared_equals_replicated(layer):
    modules = ("gate", "up")
    mixed = run(layer, modules)
    for slot in range(layer.spec.slots):
        mine = np.asarray(layer.slots) == slot
        solo = run(layer, modules, jnp.where(jnp.asarray(mine), slot, -1))
        rows = np.repeat(mine, layer.spec.top_k)
        np.testing.assert_array_equal(solo[rows], mixed[rows], f"slot {slot}")
    copies = replicated(layer, 2)  # shared outer
    np.testing.assert_array_equal(run(copies, modules), mixed)


@pytest.mark.long
def test_a_projection_without_adapters_beside_one_that_has_them(layer):
    only_up = {"up": layer.adapters["up"]}
    own = {key: value for key, value in layer.matrices.items() if key[0] == "up"}
    actual = run(layer, ("gate", "up"), adapters=only_up)
    wanted = expected(replace(layer, matrices=own), ("gate", "up"))
    assert np.linalg.norm(actual - wanted) / np.linalg.norm(wanted) < TOLERANCE["bfloat16"]


@pytest.mark.slow
def test_two_pools_of_a_give_the_bits_of_one(layer):
    """Gate and up whose A pages lie in two arrays: an entry of one reads the page of zeros of the other."""
    up = layer.adapters["up"]
    apart = layer.adapters | {"up": replace(up, a=up.a + 0)}
    np.testing.assert_array_equal(run(layer, ("gate", "up"), adapters=apart), run(layer, ("gate", "up")))


@pytest.mark.slow
def test_a_whole_layer_equals_the_oracle(layer, monkeypatch):
    """Through `routed_experts`, as if this were a GPU."""
    monkeypatch.setattr(backend, "device_capability", lambda: ((12, 0), "compute capability 12.0"))
    y = layer.function("portable")(layer.slots, layer.adapters)
    actual = np.asarray(y.astype(jnp.float32))
    wanted = layer.expected(np.arange(layer.spec.tokens))
    assert np.linalg.norm(actual - wanted) / np.linalg.norm(wanted) < TOLERANCE["bfloat16"]


def test_no_rows_at_all_is_no_hang(layer):
    """All pairs skipped: every block has nothing to do."""
    plan = make_plan(jnp.full_like(layer.chosen, -1), layer.slots, 3, 4, "portable")
    x = jnp.ones((14, 128), "bfloat16")
    portable.grouped_matmul(x, (layer.experts.gate,), plan, True, (None,), "silu")


@pytest.mark.parametrize("name", ["xla", "hopper"])
def test_a_plan_of_another_backend_is_refused(layer, name):
    plan = make_plan(layer.chosen, layer.slots, 3, 4, "xla")
    if name == "hopper":
        plan = replace(plan, alignment=8)
    with pytest.raises(UnsupportedImplementation, match="give make_plan implementation='portable'"):
        portable.grouped_matmul(jnp.ones((14, 128), "bfloat16"), (layer.experts.gate,), plan, True, (None,), "silu")


@pytest.mark.parametrize(
    ("capability", "picked", "why"),
    [
        ((7, 5), "xla", {"portable": "8.0 or later, this is compute capability 7.5"}),
        ((8, 0), "portable", {"hopper": "capability 9.0", "xla": "portable has kernels"}),
        ((9, 0), "hopper", {"portable": "hopper is preferred"}),
        ((12, 0), "portable", {"hopper": "capability 9.0"}),
    ],
)
def test_each_gpu_gets_its_backend(capability, picked, why, monkeypatch):
    found = "compute capability " + ".".join(map(str, capability))
    monkeypatch.setattr(backend, "device_capability", lambda: (capability, found))
    choice = choose(widths=(2048, 768))
    assert choice.picked == picked
    for name, text in why.items():
        assert text in choice.why_not[name]


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ({"dtype": "float32"}, "bfloat16 and float16"),
        ({"widths": (96,)}, "multiples of 64"),
        ({"operands": ("float16",)}, "one dtype"),
        ({"result": "float32"}, "returns bfloat16"),
    ],
)
def test_portable_says_what_it_cannot_run(call, why, monkeypatch):
    monkeypatch.setattr(backend, "device_capability", lambda: ((8, 9), "compute capability 8.9"))
    assert choose(**call).picked == "xla"
    with pytest.raises(UnsupportedImplementation, match=f"'portable' cannot run this: .*{why}"):
        choose("portable", **call)


def test_every_heuristic_config_fits():
    for rows in TILE_ROWS:
        for num_weights in (1, 2):
            for width in (64, 128, 192, 2048, 14336):
                config = heuristic(rows, num_weights, width)
                assert width % config.columns == 0
                assert smem_bytes(config, rows, num_weights) + RESERVED_BYTES <= SMEM_BYTES
    assert {tile_rows(pairs, 128) for pairs in (1, 64, 4096, 65536, 10**6)} == set(TILE_ROWS)
