"""What a torch user asks of the layer: every kind of adapter beside plain torch, by numbers."""

import json
import sys

import jax
import numpy as np
import pytest

from jax_moe_lora.cli.main import main
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.errors import InputError
from jax_moe_lora.layer import reference
from jax_moe_lora.parity import TOLERANCE, compare, for_reference, probes, random_inputs, table, torch_reference

pytestmark = pytest.mark.parity
CONFIG = MoEConfig(64, 48, 8, 2)
TOKENS = 13
NAMES = {probe.name: probe for probe in probes(CONFIG)}


@pytest.fixture(scope="module")
def rows():
    return table(CONFIG, TOKENS)


def test_every_kind_of_adapter_equals_plain_torch_in_every_dtype(rows):
    assert {(row.probe, row.dtype) for row in rows} == {(name, dtype) for name in NAMES for dtype in TOLERANCE}
    assert [row for row in rows if not row.within] == []
    for row in rows:
        assert row.max_result == pytest.approx(row.max_reference, rel=0.02)
        assert row.difference.max_abs <= 0.02 * row.max_reference
        assert row.difference.cosine > 0.9999


def test_zeros_present_zeros_by_either_side_and_absent_modules_are_one_result(rows):
    """In float32, bit for bit: the figures of the layer and of the reference are equal."""
    figures = {row.probe: (row.max_result, row.max_reference, row.difference) for row in rows if row.dtype == "float32"}
    assert figures["zero A"] == figures["zero B"] == figures["zero A and B"] == figures["none"]
    elsewhere = [name for name in figures if name.endswith(", zeros elsewhere")]
    assert len(elsewhere) == 6
    for name in elsewhere:
        assert figures[name] == figures[name.removesuffix(", zeros elsewhere")] != figures["none"]


def test_a_layer_that_ignores_its_adapters_is_found(monkeypatch):
    wrong = lambda *arguments, **options: compare.routed_experts(*arguments[:5], **options)  # noqa: E731
    monkeypatch.setattr(compare, "_LAYER", jax.jit(wrong, static_argnums=4, static_argnames="implementation"))
    changing = [probe for probe in probes(CONFIG) if probe.name not in ("none", "half base rows")]
    found = table(CONFIG, TOKENS, dtypes=["bfloat16"], custom_probes=[NAMES["none"], *changing])
    assert [row.probe for row in found if row.within] == ["none", "zero A", "zero B", "zero A and B"]


@pytest.mark.parametrize("probe", ["per-expert, scales too", "ranks 4, 8, 24, 40, by row", "half base rows"])
def test_the_torch_reference_and_the_numpy_one_agree(probe):
    """Both are written from the formula; neither imports the package."""
    inputs, adapters = random_inputs(CONFIG, TOKENS), [*map(for_reference, NAMES[probe].adapters)]
    slots = NAMES[probe].slots(TOKENS)
    routing = np.zeros((TOKENS, CONFIG.num_experts), np.float32)
    in_torch = torch_reference(inputs.x, inputs.chosen, inputs.weights, inputs.experts, adapters, slots).numpy()
    for token, (chosen, weights) in enumerate(zip(inputs.chosen, inputs.weights, strict=True)):
        routing[token, chosen] = weights
    for token, slot in enumerate(slots):
        y = np.zeros(CONFIG.hidden_size)
        for expert in np.flatnonzero(routing[token]):
            own = {} if slot < 0 else {m: (a, b * s[:, None, None], 1) for m, (a, b, s) in adapters[slot].items()}
            gate, up = (
                reference._linear(inputs.x[token], module, expert, inputs.experts, own, np.float32)
                for module in ("gate", "up")
            )
            hidden = gate / (1 + np.exp(-gate)) * up
            y += routing[token, expert] * reference._linear(hidden, "down", expert, inputs.experts, own, np.float32)
        np.testing.assert_allclose(in_torch[token], y, rtol=1e-4, atol=1e-5)


def test_the_reference_refuses_what_it_would_ignore():
    inputs = random_inputs(CONFIG, TOKENS)
    arguments = (inputs.x, inputs.chosen, inputs.weights, inputs.experts)
    adapter = for_reference(NAMES["only gate"].adapters[0])
    with pytest.raises(ValueError, match="got 1 adapters and no slots; give the slot of each token"):
        torch_reference(*arguments, [adapter])
    with pytest.raises(ValueError, match="the module 'fc1'; expected some of gate, up and down"):
        torch_reference(*arguments, [{"fc1": adapter["gate"]}], [0] * TOKENS)
    with pytest.raises(ValueError, match=r"A and B of gate have 3 and 8 matrices; expected 1 or 8 of each"):
        torch_reference(*arguments, [{"gate": (adapter["gate"][0][:3], *adapter["gate"][1:])}], [0] * TOKENS)
    with pytest.raises(ValueError, match=r"chosen \[13, 2\], weights \[13, 1\], slots \[13\]; expected \[T, D\]"):
        torch_reference(inputs.x, inputs.chosen, inputs.weights[:, :1], inputs.experts)
    with pytest.raises(ValueError, match=r"slots \[1\]; expected"):
        torch_reference(*arguments, [adapter], [0])


def test_the_table_says_what_it_cannot_compare():
    with pytest.raises(InputError, match="dtype is 'float8'; expected some of float32, float16, bfloat16"):
        table(CONFIG, dtypes=["float8"])
    with pytest.raises(InputError, match="dtypes is of type str; expected a list"):
        table(CONFIG, dtypes="float32")
    with pytest.raises(InputError, match="activation 'clamped_swiglu'"):
        table(MoEConfig(64, 48, 8, 2, activation="clamped_swiglu"))
    with pytest.raises(InputError, match="torch cannot compute on 'nowhere'"):
        table(CONFIG, torch_device="nowhere")


def command(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jax-moe-lora", "parity", "--shape", "5,64,48,4,2", *arguments])
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code or 0


def test_the_command_prints_a_row_per_kind_of_adapter_and_dtype(monkeypatch, capsys):
    assert command(monkeypatch, "--rank", "4", "--dtype", "float32", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "T,D,F,E,K = 5,64,48,4,2, rank 4 (float32: xla)" in out
    assert all(probe.name in out for probe in probes(CONFIG, 4))
    assert "24 of 24 errors are within the rounding of their dtype." in out


def test_the_command_fails_where_an_error_is_above_its_dtypes_rounding(monkeypatch, capsys):
    monkeypatch.setitem(compare.TOLERANCE, "float32", 1e-12)
    assert command(monkeypatch, "--dtype", "float32", "--json") == 1
    rows = json.loads(capsys.readouterr().out)
    assert not rows[0]["within"]
    assert 1e-12 < rows[0]["difference"]["relative"] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "5,64,48,4"), "--shape is '5,64,48,4'; expected T,D,F,E,K as five whole numbers above zero"),
        (("--dtype", "fp8"), "--dtype is 'fp8'; expected some of float32, bfloat16, float16"),
        (("--device", "tpu"), "jax has no device 'tpu' here; expected one of cpu"),
        (("--implementation", "hopper"), "'hopper' cannot run this"),
        (("--torch-device", "nowhere"), "torch cannot compute on 'nowhere'"),
    ],
)
def test_the_command_says_what_is_wrong_with_an_option(monkeypatch, capsys, arguments, said):
    assert command(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err
