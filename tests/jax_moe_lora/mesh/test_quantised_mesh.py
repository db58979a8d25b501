"""Quantised weights on a mesh: whole blocks of scales lie with their rows and columns, and answers are those of one."""

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.ops import quantise
from pallas_kernels.quantised.format import FORMATS
from pallas_kernels.quantised.split import cut_block, split_specs
from support.meshes import run_on_devices

FORMS = ["fp8_block", "nvfp4", "int4_zero"]


@pytest.mark.slow(40)
def test_a_quantised_checkpoint_on_a_mesh_gives_and_trains_what_one_device_does(tmp_path):
    reports = run_on_devices(8, "mesh_quantised", str(tmp_path), "data=2,expert=2,tensor=2", *FORMS)
    assert [report["format"] for report in reports] == FORMS
    for report in reports:
        assert report["error"] < 1e-5, report
        assert report["share"].pop("global_scale", 1 / 2) == 1 / 2
        assert {*report["share"].values()} == {1 / 4}, report
    assert reports[0]["trained"] < 1e-5, reports[0]
    assert reports[0]["read"] < 1e-5, reports[0]
    # k has 32 rows, one block of scales, and no array was made before it was refused.
    message = "tensor=2 cuts through blocks of 32 rows of layers.0.k [32, 64], which share a scale in fp8_block"
    assert message in reports[0]["refused"]


@pytest.mark.parametrize(
    ("name", "scales"),
    [
        ("fp8_block", P("expert", "tensor", None)),
        ("fp8_channel", P("expert", "tensor", None)),
        ("fp8_tensor", P("expert", None, None)),
        ("nvfp4", P("expert", "tensor", None)),
    ],
)
def test_scales_lie_with_the_rows_that_they_scale(name, scales):
    weight = quantise(jnp.ones((2, 256, 256), jnp.float32), FORMATS[name])
    specs = split_specs(weight, P("expert", "tensor"))
    assert specs.values == P("expert", "tensor", None)
    assert specs.scales == scales
    assert specs.global_scale == (P("expert") if name == "nvfp4" else None)
    columns = split_specs(weight, P(None, None, "tensor")).scales
    assert columns == P(None, None, "tensor" if name in ("fp8_block", "nvfp4") else None)


def test_a_split_is_refused_where_it_cuts_a_block():
    assert cut_block(FORMATS["fp8_block"], 192, 512, (2, 1)) == "blocks of 128 rows"
    assert cut_block(FORMATS["fp8_block"], 512, 192, (1, 2)) == "blocks of 128 columns"
    assert cut_block(FORMATS["fp8_block"], 192, 512, (1, 4)) == ""
    assert cut_block(FORMATS["fp8_tensor"], 10, 10, (2, 2)) == ""
    assert cut_block(FORMATS["mxfp4"], 10, 96, (5, 2)) == "blocks of 32 columns"
