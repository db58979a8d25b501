"""Rows that hold several examples: each example's logits are those that it has alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora.demo.run import load_demo
from jax_moe_lora.models import decoder
from pallas_kernels.ops import BASE_SLOT
from support.layers import assert_close

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.optimised]
NAMES = [None, "reverse", "sort", "reverse", "upper"]
LENGTHS = [5, 7, 3, 6, 4]
ROWS = [[0, 1, 2], [3, 4]]  # examples of each row, in order
WIDTH = 16


@pytest.fixture(scope="module")
def model():
    return load_demo()


@pytest.fixture(scope="module")
def examples(model):
    random = np.random.default_rng(0)
    return [random.integers(4, model.config.vocab_size, length).astype(np.int32) for length in LENGTHS]


def pack(examples, slots):
    """tokens, positions, segments and slots `[B, T]`, and where each example begins."""
    tokens, positions, segments, of_token = (np.zeros((len(ROWS), WIDTH), np.int32) for _ in range(4))
    of_token[:] = BASE_SLOT
    begins = {}
    for row, held in enumerate(ROWS):
        at = 0
        for number, index in enumerate(held, 1):
            place = row, slice(at, at + LENGTHS[index])
            tokens[place], positions[place] = examples[index], np.arange(LENGTHS[index])
            segments[place], of_token[place] = number, slots[index]
            begins[index], at = (row, at), at + LENGTHS[index]
    return (*map(jnp.asarray, (tokens, positions, segments, of_token)), begins)


@pytest.fixture(scope="module")
def run(model):
    fn = model.functional(batch=1, max_length=WIDTH)
    packed = jax.jit(partial(decoder.packed_logits, config=model.config))
    return lambda *arguments: np.asarray(packed(fn.params, fn.bank, *arguments))


@pytest.mark.slow
def test_a_packed_example_has_the_logits_that_it_has_alone(model, examples, run):
    *arguments, begins = pack(examples, np.asarray(model.slots(NAMES)))
    found = run(*arguments)
    for index, (name, tokens) in enumerate(zip(NAMES, examples, strict=True)):
        alone = np.asarray(model.logits([list(map(int, tokens))], [name]))[0]
        row, begin = begins[index]
        assert_close(found[row, begin : begin + len(tokens)], alone, 1e-5)


@pytest.mark.slow
def test_a_packed_example_has_the_same_bits_whatever_its_neighbours_are(model, examples, run):
    slots = np.asarray(model.slots(NAMES))
    *arguments, begins = pack(examples, slots)
    found = run(*arguments)
    others = [(tokens + 7) % model.config.vocab_size if index != 1 else tokens for index, tokens in enumerate(examples)]
    *arguments, _ = pack(others, np.where(np.arange(len(slots)) == 1, slots, BASE_SLOT))
    row, begin = begins[1]
    mine = row, slice(begin, begin + LENGTHS[1])
    again = run(*arguments)
    np.testing.assert_array_equal(again[mine], found[mine])
    assert (again[0, :begin] != found[0, :begin]).any()
    assert np.isfinite(found).all()


def test_padding_is_multiplied_with_no_expert_and_no_adapter(model, examples):
    slots = np.asarray(model.slots(NAMES))
    _, positions, segments, _, _ = pack(examples, slots)
    everywhere = jnp.full((len(ROWS), WIDTH), slots[1])  # padding too
    fn = model.functional(batch=1, max_length=WIDTH)
    step = decoder.packed_step(positions, segments, everywhere, fn.bank, None)
    padding = np.asarray(segments == 0)
    np.testing.assert_array_equal(step.row_mask, ~padding)
    assert (np.asarray(step.slots).reshape(padding.shape)[padding] == BASE_SLOT).all()
    assert (np.asarray(step.slots).reshape(padding.shape)[~padding] == slots[1]).all()


@pytest.mark.slow
def test_rows_of_one_example_each_need_no_mask(model, examples):
    """What lies behind an example is never looked at."""
    tokens, positions, segments, slots, _ = pack(examples, np.asarray(model.slots(NAMES)))
    first = segments == 1
    arguments = tokens, positions, jnp.where(first, 1, 0), slots
    fn = model.functional(batch=1, max_length=WIDTH)
    hidden = jax.jit(partial(decoder.packed_hidden, config=model.config), static_argnames="packed")
    masked, alone = (hidden(fn.params, fn.bank, *arguments, packed=packed)[0] for packed in (True, False))
    assert_close(np.asarray(alone)[np.asarray(first)], np.asarray(masked)[np.asarray(first)], 1e-6)
