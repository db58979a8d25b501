"""The promises of the layer, kept by whole models: prompts read, tokens decoded, cache reused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import Model
from jax_moe_lora.adapters.bank import create_bank
from jax_moe_lora.adapters.lora import LoRAAdapter, uniform
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.demo.run import load_demo
from jax_moe_lora.models import decoder
from jax_moe_lora.models.params import init_params
from jax_moe_lora.models.sites import adapter_sites
from jax_moe_lora.serving import programs
from jax_moe_lora.serving.sampling import greedy
from support.models import decoder_config, prefill_and_decode

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.slow, pytest.mark.optimised]
MIXED = [None, "upper", "reverse", "sort", None]
STEPS = 3


@pytest.fixture(scope="module")
def model() -> Model:
    return load_demo()


def qwen2_moe() -> Model:
    """Random weights, a dense layer and a routed one with its shared expert; three adapters on every projection."""
    moe = MoEConfig(hidden_size=32, expert_width=24, num_experts=4, top_k=2)
    widths, attention = {"mlp_width": 48, "shared_width": 40}, {"qk_norm": None, "biases": "qkv"}
    config = decoder_config("qwen2_moe", 32, 32, (4, 2, 8), moe, (False, True), **widths, **attention)
    sites = adapter_sites(config)
    params = init_params(config, jax.random.key(0), "float32")
    model = Model(config, params, create_bank(sites, 4, 16, None, "float32"))
    random = np.random.default_rng(0)
    for name in filter(None, MIXED):
        weights = {}
        for (module, site), layer in ((each, layer) for each in sites.items() for layer in each[1].layers):
            a = random.normal(size=(site.num_experts, 4, site.in_width)).astype(np.float32)
            b = random.normal(size=(site.num_experts, site.out_width, 4)).astype(np.float32)
            weights[layer, module] = uniform(a, b, 0.02, site.num_experts)
        model.load_adapter(LoRAAdapter(name, weights), adapter_name=name)
    return model


@pytest.fixture(scope="module", params=["demo", "qwen2_moe"])
def run(request):
    """Logits `[1 + STEPS, B, V]` of one prefill and some decode steps, whose tokens are the same whatever the slots."""
    model = qwen2_moe() if request.param == "qwen2_moe" else request.getfixturevalue("model")
    return prefill_and_decode(model, [4, 6, 8, 1, 5], 16, STEPS)


def test_1_base_rows_have_the_bits_of_the_model_without_a_bank(run):
    mixed, base = run(MIXED), run([None] * len(MIXED), bank=None)
    rows = [row for row, name in enumerate(MIXED) if name is None]
    np.testing.assert_array_equal(mixed[:, rows], base[:, rows])
    others = [row for row, name in enumerate(MIXED) if name is not None]
    assert (mixed[:, others] != base[:, others]).any(axis=-1).all(), "the adapters change nothing"


def test_2_mixed_equals_solo_in_prefill_and_decode(run):
    mixed = run(MIXED)
    for row, name in enumerate(MIXED):
        solo = run([name if index == row else None for index in range(len(MIXED))])
        np.testing.assert_array_equal(mixed[:, row], solo[:, row], err_msg=str(name))


def test_logits_without_lengths_are_those_of_whole_rows(model):
    tokens = np.arange(12).reshape(3, 4)
    whole = model.logits(tokens, [None, "upper", "sort"], [4, 4, 4])
    np.testing.assert_array_equal(model.logits(tokens, [None, "upper", "sort"]), whole)


def test_the_cache_is_reused_in_place(model):
    """A step must not hold two caches: at real sizes it is the largest array after the weights."""
    cache = decoder.init_cache(model.config, 2, 32, "float32")
    sampling = greedy(2)
    slots, static = model.slots([None, "upper"]), {"config": model.config, "implementation": None}
    bank = model.functional(2, 32).bank
    where = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)]
    read, drawn = programs.start(
        model.params, bank, cache, jnp.ones((2, 16), jnp.int32), jnp.array([3, 5]), slots, sampling, **static
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(cache.layers))
    index = jnp.ones(2, jnp.int32)
    after, _ = programs.advance(model.params, bank, read, drawn.tokens, slots, sampling, index, None, **static)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(read.layers))
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(after.layers)] == where
