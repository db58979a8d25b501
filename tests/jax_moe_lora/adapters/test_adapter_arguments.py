"""Adapters in memory and banks: whatever numpy can read is taken, and what would be cast or ignored is refused."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import InputError
from jax_moe_lora.adapters.bank import AdapterBank, create_bank, remove
from jax_moe_lora.adapters.extraction import extract
from jax_moe_lora.adapters.insertion import insert
from jax_moe_lora.adapters.lora import LoRAAdapter, LoRAWeights, Site, uniform
from support.unchecked import annotations_unchecked

D, F, E, R = 8, 16, 2, 4
SITES = {"gate": Site(D, F, E, (0,)), "up": Site(D, F, E, (0,))}
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(E, R, D)).astype(np.float32), RNG.normal(size=(E, F, R)).astype(np.float32)
RANKS, SCALE = np.full(E, R, np.int32), np.full(E, 0.5, np.float32)
ARRAYS = A, B, RANKS, SCALE


@pytest.fixture(autouse=True)
def _as_users_run_it():
    with annotations_unchecked():
        yield


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    return create_bank(SITES, 2, 16, None, "float32")


def adapter(*arrays) -> LoRAAdapter:
    a, b, ranks, scale = arrays
    return LoRAAdapter("test", {(0, module): LoRAWeights(a, b, ranks, scale) for module in SITES})


@pytest.mark.parametrize("kind", [jnp.asarray, np.ndarray.tolist, memoryview], ids=["jax", "lists", "buffers"])
def test_an_adapter_of_anything_that_numpy_reads_is_the_same_adapter(bank, kind):
    given, read = [LoRAWeights(*arrays) for arrays in (ARRAYS, map(kind, ARRAYS))]
    expected, found = [insert(bank, 1, LoRAAdapter("test", {(0, "up"): weights})) for weights in (given, read)]
    for one, other in zip(jax.tree.leaves(expected.layer(0)), jax.tree.leaves(found.layer(0)), strict=True):
        np.testing.assert_array_equal(one, other)
    back = extract(found, 1, "back").weights[0, "up"]
    np.testing.assert_array_equal(back.a, A)
    np.testing.assert_array_equal(back.b, B)


def test_bfloat16_arrays_of_jax_are_taken_as_they_are():
    half = create_bank(SITES, 1, 16, None, "bfloat16")
    a, b = jnp.asarray(A, jnp.bfloat16), jnp.asarray(B, jnp.bfloat16)
    loaded = insert(half, 0, LoRAAdapter("half", {(0, "gate"): uniform(a, b, 0.5, E)}))
    np.testing.assert_array_equal(extract(loaded, 0, "back").weights[0, "gate"].a, np.asarray(a))


def test_arrays_of_jax_that_modules_share_are_stored_once(bank):
    shared = adapter(jnp.asarray(A), jnp.asarray(B), RANKS, SCALE)
    assert bank.nbytes_of(shared) == bank.nbytes_of(adapter(*ARRAYS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": A.astype(np.complex64)}, "a of LoRA weights has dtype complex64; expected floating point"),
        ({"b": B.astype(np.complex128)}, "b of LoRA weights has dtype complex128"),
        ({"a": A.astype(np.int8)}, "a of LoRA weights has dtype int8"),
        ({"b": B > 0}, "b of LoRA weights has dtype bool"),
        ({"ranks": RANKS.astype(np.float32)}, "ranks of LoRA weights has dtype float32; expected integers"),
        ({"scale": SCALE.astype(np.complex64)}, "scale of LoRA weights has dtype complex64"),
        ({"a": [[0.0], [0.0, 1.0]]}, "a of LoRA weights is of type list, which numpy cannot read"),
        ({"a": None}, "a of LoRA weights has dtype object"),
    ],
)
def test_numbers_of_another_kind_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        LoRAWeights(**{"a": A, "b": B, "ranks": RANKS, "scale": SCALE} | changes)


def test_traced_arrays_are_refused_in_a_sentence():
    with pytest.raises(InputError, match="a of LoRA weights is traced by jax's jit or grad"):
        jax.jit(lambda a: uniform(a, B, 1.0, E).a.sum())(A)


@pytest.mark.parametrize("weights", [{"gate": 1}, {(0, "gate"): (A, B)}, {(0, "gate", 1): None}])
def test_an_adapter_holds_weights_by_layer_and_module(weights):
    with pytest.raises(InputError, match=r"expected LoRAWeights under \(layer, module\)"):
        LoRAAdapter("bad", weights)


@pytest.mark.parametrize("dtype", ["int8", "int32", "complex64", "float64", "float8_e4m3fn", bool])
def test_a_bank_of_a_dtype_that_adapters_are_not_served_in_is_refused(dtype):
    with pytest.raises(InputError, match=r"dtype is .*; expected one of float32, bfloat16, float16"):
        create_bank(SITES, 1, 16, None, dtype)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ({}, "for at least one module"),
        ([SITES["gate"]], "expected module -> Site"),
        ({"gate": (D, F, E, (0,))}, "expected a Site under a module's name"),
        ({"gate": Site(0, F, E, (0,))}, "in_width of gate is 0"),
        ({"gate": Site(D, 16.0, E, (0,))}, "out_width of gate is 16.0"),
        ({"gate": Site(D, F, E, [0])}, "layers of gate are"),
        ({"gate": Site(D, F, E, (0, 0))}, "layers of gate are"),
        ({"gate": Site(D, F, E, (-1,))}, "a layer of gate is -1"),
    ],
)
def test_sites_that_are_none_are_refused(sites, message):
    with pytest.raises(InputError, match=message):
        create_bank(sites, 1, 16, None, "float32")


@pytest.mark.parametrize("memory", [1e6, "1MiB", -1, True])
def test_a_budget_that_is_no_number_of_bytes_is_refused(memory):
    with pytest.raises(InputError, match="memory is"):
        create_bank(SITES, 1, 16, memory, "float32")


@pytest.mark.parametrize("layer", [-1, 0.0, "0", True])
def test_a_layer_that_is_none_is_refused(bank, layer):
    """It would have no adapters, and every row would be a base row."""
    with pytest.raises(InputError, match="layer is"):
        bank.layer(layer)


@pytest.mark.parametrize("slot", [-1, -2, 2, 0.0])
def test_bytes_of_a_slot_that_is_none_are_refused(bank, slot):
    with pytest.raises(InputError, match="slots 0 to 1"):
        bank.slot_nbytes(slot)


def test_what_is_no_adapter_or_no_whole_bank_is_refused(bank):
    own = adapter(*ARRAYS)
    with pytest.raises(InputError, match="adapter is of type dict; expected a LoRAAdapter"):
        insert(bank, 0, own.weights)
    view = bank.layer(0)
    for change in (lambda: insert(view, 0, own), lambda: remove(view, 0)):
        with pytest.raises(InputError, match="bank is of type LayerPages"):
            change()


def test_one_scale_is_not_spread_over_experts(bank):
    lonely = replace(adapter(*ARRAYS).weights[0, "gate"], scale=SCALE[:1])
    with pytest.raises(Exception, match="ranks and scale have shapes"):
        insert(bank, 0, LoRAAdapter("one scale", {(0, "gate"): lonely}))
