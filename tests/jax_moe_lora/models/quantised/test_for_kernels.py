"""Experts in few bits are packed at load where the Hopper kernels would multiply them, and stay in rows elsewhere."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.models.quantised.for_kernels import pack_experts, packed_format
from pallas_kernels import backend
from pallas_kernels.ops import dequantise, quantise, unpack
from pallas_kernels.quantised.format import FP8_BLOCK, MXFP4, NVFP4, int4
from support.meshes import run_on_devices


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(backend, "device_capability", lambda: ((9, 0), "compute capability 9.0"))


def layer(form, shape=(2, 128, 128)):
    rng = np.random.default_rng()
    drawn = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name in ("gate", "up", "down")}
    return {name: quantise(array, form) for name, array in drawn.items()} | {"norm": jnp.ones(128)}


@pytest.mark.parametrize("form", [FP8_BLOCK, MXFP4, int4(128)], ids=lambda form: form.name)
def test_experts_are_packed_and_their_rows_given_up(form, on_hopper):
    given = layer(form)
    numbers = {name: np.asarray(dequantise(given[name], jnp.bfloat16)) for name in ("gate", "up", "down")}
    (packed,) = pack_experts((given,), "bfloat16")
    assert packed.keys() == given.keys()
    assert packed["norm"] is given["norm"]
    for name, expected in numbers.items():
        assert packed[name].format.layout == "hopper"
        assert given[name].values.is_deleted()
        found = dequantise(packed[name], jnp.bfloat16)
        assert np.linalg.norm(np.asarray(found - expected, np.float32)) <= 4e-3 * np.linalg.norm(
            expected.astype(np.float32)
        )
        assert unpack(packed[name]).format == form


@pytest.mark.parametrize(
    ("make", "dtype", "implementation"),
    [
        (lambda: layer(NVFP4), "bfloat16", None),
        (lambda: layer(MXFP4, (2, 96, 96)), "bfloat16", None),
        (lambda: layer(FP8_BLOCK), "float32", None),
        (lambda: layer(FP8_BLOCK), "bfloat16", "xla"),
        (lambda: layer(FP8_BLOCK) | {"up": jnp.ones((2, 128, 128))}, "bfloat16", None),
        (lambda: layer(FP8_BLOCK) | {"up": layer(MXFP4)["up"]}, "bfloat16", None),
        (lambda: layer(FP8_BLOCK) | {"down": layer(MXFP4)["down"]}, "bfloat16", None),
        (lambda: {"norm": jnp.ones(128)}, "bfloat16", None),
    ],
    ids=["no form", "widths", "float32", "xla", "one in 16 bits", "two formats", "another one for down", "dense layer"],
)
def test_what_other_code_multiplies_stays_in_rows(make, dtype, implementation, on_hopper):
    given = make()
    (kept,) = pack_experts((given,), dtype, implementation)
    assert kept is given


def test_exponents_beyond_bfloat16s_stay_in_rows(on_hopper):
    given = layer(MXFP4)
    given["up"] = replace(given["up"], scales=given["up"].scales.at[1, 3, 2].set(129))
    (kept,) = pack_experts((given,), "bfloat16")
    assert kept is given


def test_a_bank_of_more_slots_than_the_kernels_serve_leaves_experts_in_rows(on_hopper):
    given = layer(FP8_BLOCK)
    assert pack_experts((given,), "bfloat16", slots=257) == (given,)
    assert pack_experts((given,), "bfloat16", slots=256)[0]["gate"].format.layout == "hopper"


def test_what_is_packed_stays_and_what_others_hold_is_not_given_up(on_hopper):
    given = layer(MXFP4)
    given["other"] = given["gate"]
    (packed,) = pack_experts((given,), "bfloat16")
    assert not given["gate"].values.is_deleted()
    assert pack_experts((packed,), "bfloat16") == (packed,)


def test_matrices_that_share_arrays_are_packed(on_hopper):
    given = layer(FP8_BLOCK)
    given["up"] = given["gate"]
    expected = np.asarray(dequantise(given["gate"], jnp.bfloat16))
    (packed,) = pack_experts((given,), "bfloat16")
    for name in ("gate", "up"):
        assert (np.asarray(dequantise(packed[name], jnp.bfloat16)) == expected).all()


def test_nothing_is_packed_without_such_a_gpu():
    given = layer(FP8_BLOCK)
    assert pack_experts((given,), "bfloat16") == (given,)
    assert packed_format(FP8_BLOCK, 128, 128, "bfloat16", "hopper") == FP8_BLOCK


@pytest.mark.slow(20)
def test_each_device_packs_its_own_part():
    reports = run_on_devices(4, "mesh_packed", "expert=2,tensor=2", "fp8_block", "fp8_tensor", "mxfp4")
    assert [report["format"] for report in reports] == ["fp8_block", "fp8_tensor", "mxfp4"]
    for report in reports:
        assert report["layout"] == "hopper", report
        assert report["equal"], report
        assert report["share"] == 1 / 4, report
        assert report["freed"], report
