"""Which backend a call gets, and why not the others."""

import pytest

from pallas_kernels import backend
from pallas_kernels.ops import UnsupportedImplementation, choose


def test_an_unknown_implementation_is_refused_with_the_choices():
    with pytest.raises(UnsupportedImplementation, match="'fast' is unknown; use one of"):
        choose("fast")


@pytest.mark.parametrize(
    ("name", "why"),
    [("hopper", "needs a GPU of compute capability 9.0"), ("portable", "needs a GPU of compute capability 8.0")],
)
def test_a_backend_that_is_not_here_says_why(name, why):
    with pytest.raises(UnsupportedImplementation, match=f"{name!r} cannot run this: .*{why}.*; use 'xla' or None"):
        choose(name)


def test_a_call_tells_what_was_picked_and_why_not_the_others():
    choice = choose()
    assert choice.picked == "xla"
    assert set(choice.why_not) == {"hopper", "portable", "reference"}
    assert all(choice.why_not.values())


def test_an_explicit_choice_says_why_not_each_other():
    assert set(choose("reference").why_not) == {"hopper", "portable", "xla"}


def test_more_slots_than_hopper_serves_are_another_backends(monkeypatch):
    monkeypatch.setattr(backend, "device_capability", lambda: ((9, 0), "compute capability 9.0"))
    assert choose(slots=256).picked == "hopper"
    choice = choose(slots=257)
    assert choice.picked == "portable"
    assert "up to 256 adapter slots, these are 257" in choice.why_not["hopper"]
    with pytest.raises(UnsupportedImplementation, match="up to 256 adapter slots"):
        choose("hopper", slots=257)


@pytest.mark.parametrize(
    ("capability", "picked", "why"),
    [
        ((7, 5), "xla", {"portable": "8.0 or later, this is compute capability 7.5"}),
        ((8, 0), "portable", {"hopper": "capability 9.0", "xla": "portable is preferred"}),
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
