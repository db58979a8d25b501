"""A benchmark command prints one table on standard output; what is measured meanwhile goes to standard error."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

from jax_moe_lora.benchmark import ceilings, load, model, report, sweep, train
from jax_moe_lora.cli.main import main

LOADED = {"mb": 3.0, "load_ms": 1.5}
CELL = {"shape": "small", "adapters": "none", "tokens": 3, "routing": "uniform", "slots": "uniform"}


@pytest.fixture
def without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"kind": "decode", "batch": 8, "length": 4, "adapters": "none", "ms": 2.5}
    cell = CELL | {"engine": "jax_moe_lora", "layer_us": 10.0, "floor_us": 5.0, "rel_err": 1e-7}
    loads = {"per-expert": LOADED, "shared-outer": LOADED, "decode_ms": 7.25, "copy_gb_per_s": 20}
    values: list[tuple[Any, str, Callable[..., Any]]] = [
        (report, "about", lambda commands: {"versions": {}, "device": "cpu", "date": "today"}),
        (load, "measure_loads", lambda *_: loads),
        (model, "sweep", lambda *_: iter([step])),
        (sweep, "sweep", lambda *_: iter([cell])),
        (train, "measure", lambda *_: {"ms": 2.5}),
        (train, "floor_ms", lambda *_: 1.0),
        (ceilings, "measure_ceilings", lambda: None),
    ]
    for owner, name, value in values:
        monkeypatch.setattr(owner, name, value)


@pytest.mark.usefixtures("without_measuring")
@pytest.mark.parametrize(
    ("arguments", "shown", "caption"),
    [
        (["bench", "--shape", "small", "--tokens", "3"], "10.0", "0.50 of the floor's speed"),
        (["bench-load", "--model", "tiny"], "1.5", "A decode step alone takes 7.25 ms"),
        (["bench-model", "--model", "tiny"], "2.5", ""),
        (["bench-train", "--model", "tiny", "--adapters", "1"], "2.5", ""),
    ],
)
def test_a_benchmark_command_prints_one_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], shown: str, caption: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["jax-moe-lora", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr()
    assert printed.out.count("┏") == printed.out.count("└") == 1, printed.out
    assert shown in printed.out.partition("└")[0]
    assert caption in " ".join(printed.out.partition("└")[2].split())
    assert "{" not in printed.out + printed.err
