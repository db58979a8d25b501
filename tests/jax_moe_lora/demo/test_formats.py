"""The committed figures of formats' accuracy are those of the code."""

import json

import pytest

from jax_moe_lora.demo.formats import COMPARED, bits_per_weight, layer_errors
from support import ROOT

ROWS = json.loads((ROOT / "pallas_kernels" / "results" / "formats_cpu.json").read_text())["rows"]


@pytest.mark.slow
def test_each_format_has_a_row_with_its_bits_and_errors_in_order():
    assert [row["format"] for row in ROWS] == [*COMPARED]
    (row,) = (row for row in ROWS if row["format"] == "mxfp4")
    format = COMPARED["mxfp4"]
    assert row["bits"] == pytest.approx(bits_per_weight(format), abs=0.01)
    assert layer_errors(format) == pytest.approx({name: row[name] for name in ("weights", "layer")}, rel=0.01)
