"""Adapters from a seed: a matrix per expert, or one that all experts share, and its copies for a reference."""

from dataclasses import replace

import numpy as np
import pytest

from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.errors import InputError
from jax_moe_lora.parity import expand_shared, for_reference, per_expert_adapter, shared_adapter

CONFIG = MoEConfig(32, 24, 4, 2)


def sizes(adapter) -> dict[str, tuple[int, int]]:
    """Module -> how many matrices A and B have."""
    return {module: (len(w.a), len(w.b)) for (_, module), w in adapter.weights.items()}


def test_a_seed_gives_the_same_adapter_again_and_another_seed_another():
    first, again, other = (per_expert_adapter(CONFIG, 5, seed=seed).weights[0, "up"] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.a, again.a)
    np.testing.assert_array_equal(first.b, again.b)
    assert (first.a != other.a).any()


def test_by_default_the_sides_at_the_hidden_width_are_shared():
    adapter = shared_adapter(CONFIG, 5)
    assert sizes(adapter) == {"gate": (1, 4), "up": (1, 4), "down": (4, 1)}
    assert adapter.weights[0, "down"].a.shape == (4, 5, 24)
    assert sizes(per_expert_adapter(CONFIG)) == dict.fromkeys(("gate", "up", "down"), (4, 4))


def test_sides_are_shared_by_module():
    assert sizes(shared_adapter(CONFIG, sides={"gate": "b", "down": "a"})) == {
        "gate": (4, 1),
        "up": (4, 4),
        "down": (1, 4),
    }


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sides": {"gate": "c"}}, "The shared side of gate is 'c'; expected 'a' or 'b'"),
        ({"sides": {"gate": ("a", "b")}}, "The shared side of gate is"),
        ({"sides": {"fc1": "a"}}, "sides name 'fc1'; expected some of gate, up, down"),
        ({"sides": {"up": "a"}, "modules": ["gate"]}, "sides name 'up', which is none of the modules gate"),
        ({"sides": ["a"]}, "sides are of type list; expected module -> 'a' or 'b'"),
        ({"modules": "gate"}, "modules is of type str; expected a list"),
        ({"modules": []}, r"modules are \[\]; expected some of gate, up, down, each once"),
        ({"modules": ["up", "up"]}, r"modules are \['up', 'up'\]; expected some of gate, up, down, each once"),
        ({"scale": float("nan")}, "scale is nan; expected a finite number"),
        ({"modules": ["q"]}, "modules name 'q'; expected some of gate, up, down"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_a_bad_side_module_rank_or_scale_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        shared_adapter(CONFIG, **options)


def test_the_expansion_copies_what_is_shared_and_nothing_else():
    adapter = shared_adapter(CONFIG, 5)
    expanded = expand_shared(adapter)
    assert set(sizes(expanded).values()) == {(4, 4)}
    for key, weights in adapter.weights.items():
        for expert in range(4):
            np.testing.assert_array_equal(expanded.weights[key].delta(expert), weights.delta(expert))
    assert expanded.weights[0, "gate"].b is adapter.weights[0, "gate"].b


def test_two_modules_with_one_shared_matrix_have_one_copy_of_it_afterwards():
    weights = shared_adapter(CONFIG, 5).weights
    up = replace(weights[0, "up"], a=weights[0, "gate"].a)
    expanded = expand_shared(LoRAAdapter("fused", {**weights, (0, "up"): up})).weights
    assert expanded[0, "up"].a is expanded[0, "gate"].a
    assert len(expanded[0, "up"].a) == 4


def test_an_adapter_beside_the_experts_has_no_reference():
    weights = per_expert_adapter(CONFIG).weights[0, "gate"]
    with pytest.raises(InputError, match="targets 'router', which torch_reference does not have"):
        for_reference(LoRAAdapter("mine", {(0, "router"): weights}))


@pytest.mark.parity
@pytest.mark.parametrize("sides", [{"gate": "a", "up": "a", "down": "b"}, {"gate": "b", "up": "a", "down": "a"}])
def test_in_the_reference_a_shared_adapter_is_its_replicated_one_bit_for_bit(sides):
    from jax_moe_lora.parity import random_inputs, torch_delta, torch_reference

    inputs, adapter = random_inputs(CONFIG, 11), shared_adapter(CONFIG, 7, sides=sides)
    native, replicated = for_reference(adapter), for_reference(expand_shared(adapter))
    rows = {module: np.resize(inputs.x, (11, weights[0].shape[2])) for module, weights in native.items()}
    for module in native:
        for expert in range(CONFIG.num_experts):
            deltas = [torch_delta(rows[module], *form[module], expert).numpy() for form in (native, replicated)]
            np.testing.assert_array_equal(*deltas)
            assert deltas[0].any()
    results = [
        torch_reference(inputs.x, inputs.chosen, inputs.weights, inputs.experts, [form], [0] * 11).numpy()
        for form in (native, replicated)
    ]
    np.testing.assert_array_equal(*results)
