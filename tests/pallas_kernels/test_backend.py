"""Which backend a call gets, and why not the others."""

from dataclasses import replace

import jax.numpy as jnp
import pytest

from pallas_kernels import backend
from pallas_kernels.ops import LoRAPages, UnsupportedImplementation, choose, grouped_lora, make_plan


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


OWN_PLAN = "ask for implementation='reference', which can read this plan, or give make_plan implementation='xla'"


@pytest.mark.parametrize(
    ("planned", "asked", "advice"),
    [
        ("hopper", None, f"'hopper' has no grouped_lora; {OWN_PLAN}"),
        ("hopper", "hopper", f"'hopper' has no grouped_lora; {OWN_PLAN}"),
        ("hopper", "xla", "which 'xla' cannot read; give make_plan implementation='xla'"),
        ("portable", None, "'portable' has no grouped_lora; ask for implementation='xla' or 'reference', which can"),
    ],
)
def test_an_op_that_a_plans_backend_lacks_says_in_one_sentence_what_runs(planned, asked, advice):
    with pytest.raises(UnsupportedImplementation, match=rf"^The plan was made for {planned!r}, .*{advice}.*\.$"):
        backend.backend_for_plan(planned, asked, "grouped_lora")
    for runs in ("reference", *(("xla",) if planned == "portable" else ())):  # as it is advised
        assert backend.backend_for_plan(planned, runs, "grouped_lora").name == runs
    assert backend.backend_for_plan("xla", None, "grouped_lora").name == "xla"


def test_grouped_lora_gives_that_advice():
    plan = make_plan(jnp.zeros((3, 1), jnp.int32), jnp.zeros(3, jnp.int32), 1, 1, "xla")
    pages = LoRAPages(*[jnp.zeros((1, 16, 8))] * 2, jnp.zeros((1, 1, 4), jnp.int32), jnp.ones((1, 1)), 16)
    rows = jnp.ones((plan.order.shape[0], 8))
    with pytest.raises(UnsupportedImplementation, match=OWN_PLAN):
        grouped_lora(rows, rows, pages, replace(plan, backend="hopper"))
