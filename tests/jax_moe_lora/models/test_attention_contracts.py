"""The promises of the layer, kept by models of each kind of attention: windows and sinks, latents, delta-net."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jax_moe_lora import Model, count_compilations
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.lora import EXPERT_MODULES, LoRAAdapter, LoRAWeights, uniform
from jax_moe_lora.models.families.examples import example
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.params import init_params
from jax_moe_lora.models.sites import layer_sites
from support.models import prefill_and_decode

pytestmark = [pytest.mark.slow(10), pytest.mark.xdist_group("attention_contracts"), pytest.mark.optimised]
ROWS = [None, "one", "two", "three", None]
STEPS = 3


def adapter(model: Model, name: str, seed: int, b_size: float = 1.0, shared: str = "") -> LoRAAdapter:
    """A random adapter on every projection of the layers.

    Args:
      model: what it is for.
      name: its name.
      seed: of its numbers.
      b_size: factor on B; 0 gives an adapter that changes nothing.
      shared: `one` for a single A of all experts of gate and up, `copies` for as many equal ones.
    """
    random = np.random.default_rng(seed)
    weights: dict[tuple[int, str], LoRAWeights] = {}
    for module, site in layer_sites(model.config).items():
        count = site.num_experts
        for layer in site.layers:
            a = random.normal(size=(count, 4, site.in_width)).astype(np.float32)
            b = b_size * random.normal(size=(count, site.out_width, 4)).astype(np.float32)
            if shared and module in EXPERT_MODULES[:2]:
                a = a[:1] if shared == "one" else np.repeat(a[:1], count, axis=0)
            weights[layer, module] = uniform(a, b, 0.02, count)
    return LoRAAdapter(name, weights)


@pytest.fixture(scope="module", params=["gpt_oss", "deepseek_v3", "qwen3_next"])
def model(request) -> Model:
    """Random weights, a layer of each kind that the family has."""
    whole = family(request.param).read_config(example(request.param), None, request.param)
    config = replace(whole, layers=tuple(dict.fromkeys(whole.layers)))
    params = init_params(config, jax.random.key(0), "float32")
    model = Model(config, params, create_bank(layer_sites(config), 6, 16, None, "float32"))
    for seed, name in enumerate(filter(None, ROWS)):
        model.load_adapter(adapter(model, name, seed), adapter_name=name)
    model.load_adapter(adapter(model, "zero", 3, 0.0), adapter_name="zero")
    model.load_adapter(adapter(model, "shared", 4, shared="one"), adapter_name="shared")
    model.load_adapter(adapter(model, "copies", 4, shared="copies"), adapter_name="copies")
    return model


@pytest.fixture(scope="module")
def run(model):
    """Logits `[1 + STEPS, B, V]` of one prefill and some decode steps, whose tokens are the same whatever the slots."""
    return prefill_and_decode(model, [14, 20, 18, 1, 5], 32, STEPS)


def test_1_base_rows_have_the_bits_of_the_model_without_a_bank(run):
    mixed, base = run(ROWS), run([None] * len(ROWS), bank=None)
    for row, name in enumerate(ROWS):
        if name is None:
            np.testing.assert_array_equal(mixed[:, row], base[:, row])
        else:
            assert (mixed[:, row] != base[:, row]).any(), "the adapter changes nothing"


def test_2_mixed_equals_solo(run):
    mixed = run(ROWS)
    for row, name in enumerate(ROWS):
        solo = run([name if index == row else None for index in range(len(ROWS))])
        np.testing.assert_array_equal(mixed[:, row], solo[:, row], err_msg=str(name))


def test_3_shared_equals_replicated(run):
    np.testing.assert_array_equal(run(["shared"] * len(ROWS)), run(["copies"] * len(ROWS)))


def test_4_zero_adapters_are_exact(run):
    np.testing.assert_array_equal(run(["zero"] * len(ROWS)), run([None] * len(ROWS)))


def test_5_and_8_nothing_compiles_for_another_mix_and_bits_repeat(run):
    first = run(ROWS)
    with count_compilations() as count:
        run(ROWS[::-1])
        again = run(ROWS)
    assert count.compilations == 0
    np.testing.assert_array_equal(first, again)
