"""The experts that generation used come back with it, and can be given to whoever reads the tokens again."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import InputError, Model
from jax_moe_lora.demo.run import load_demo
from jax_moe_lora.inspect import router_trace
from jax_moe_lora.models.sites import layer_sites
from jax_moe_lora.training.adapters import init_params
from jax_moe_lora.training.batch import Batch
from jax_moe_lora.training.evaluation import make_evaluation
from jax_moe_lora.training.spec import AdapterSpec

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.optimised]
PROMPTS, NAMES = ["abcdef>", "hi>", "hello world>"], [None, "upper", "reverse"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_demo()


@pytest.fixture(scope="module")
def answered(model):
    return model.generate(PROMPTS, NAMES, max_new_tokens=6, return_routing=[True, True, False])


def whole(model: Model, prompt: str, answer) -> np.ndarray:
    return np.array(model.tokenizer.encode(prompt) + answer.token_ids)


@pytest.mark.slow
def test_the_experts_of_prompt_and_answer_are_those_of_the_routers(model, answered):
    assert answered[2].routing is None
    for prompt, name, answer in zip(PROMPTS[:2], NAMES[:2], answered[:2], strict=True):
        tokens = whole(model, prompt, answer)
        trace = router_trace(model, tokens[None], [name])
        read = len(tokens) - 1  # nothing was drawn after the last one
        assert answer.routing.shape == (read, len(trace.layers), model.config.moe.top_k)
        np.testing.assert_array_equal(answer.routing, trace.experts[:, 0, :read].transpose(1, 0, 2))


@pytest.mark.slow
def test_replayed_experts_give_the_same_logits_and_others_do_not(model, answered):
    rows = [whole(model, prompt, answer) for prompt, answer in zip(PROMPTS[:2], answered[:2], strict=True)]
    lengths = [len(row) for row in rows]
    tokens = np.stack([np.pad(row, (0, max(lengths) - len(row))) for row in rows])
    routing = [answer.routing for answer in answered[:2]]
    free = np.asarray(model.logits(tokens, NAMES[:2], lengths))
    replayed = np.asarray(model.logits(tokens, NAMES[:2], lengths, routing))
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(replayed[row, :length], free[row, :length])
    moved = [(of_row + 1) % model.config.moe.num_experts for of_row in routing]
    changed = np.asarray(model.logits(tokens, NAMES[:2], lengths, moved))
    assert np.abs(changed[0, 0] - free[0, 0]).max() > 1e-3


@pytest.mark.slow
def test_training_reads_the_experts_of_a_batch(model):
    config = model.config
    specs = {"new": AdapterSpec(rank=4, targets=("gate", "down"))}
    params = {"new": init_params(specs["new"], layer_sites(model.config), jax.random.key(0))}
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    rows, ones = jnp.asarray(tokens[:, :-1]), jnp.ones((2, 8), jnp.int32)
    places = jnp.tile(jnp.arange(8, dtype=jnp.int32), (2, 1))
    targets = jnp.asarray(tokens[:, 1:])
    batch = Batch(rows, places, ones, 0 * ones, targets, ones.astype(jnp.float32), packed=False)
    evaluate = make_evaluation(config, specs)
    free = evaluate(params, model.params, batch).loss
    own = router_trace(model, np.asarray(rows)).experts.transpose(1, 2, 0, 3)
    assert evaluate(params, model.params, replace(batch, routing=jnp.asarray(own))).loss == free
    moved = jnp.asarray((own + 1) % config.moe.num_experts)
    assert evaluate(params, model.params, replace(batch, routing=moved)).loss != free
    nothing = jnp.full_like(moved, -1)
    assert evaluate(params, model.params, replace(batch, routing=nothing)).loss == free


@pytest.mark.parametrize(
    ("routing", "problem"),
    [
        ([np.zeros((2, 1, 1), int)] * 2, "2 rows; expected 1"),
        ([np.zeros((2, 9, 9), int)], r"expected integers \[tokens"),
        ([np.zeros((2, 9), float)], r"expected integers \[tokens"),
        (["long"], "at most 3"),
        (["high"], "or -1 where the router chooses"),
    ],
)
def test_routing_of_another_form_is_refused(model, routing, problem):
    layers, top_k = len(model.config.routed_layers), model.config.moe.top_k
    named = {"long": np.zeros((4, layers, top_k), int), "high": np.full((2, layers, top_k), 999)}
    routing = [named[row] if isinstance(row, str) else row for row in routing]
    with pytest.raises(InputError, match=problem):
        model.logits([[1, 2, 3]], routing=routing)
