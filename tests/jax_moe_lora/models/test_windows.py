"""Sliding windows: every way to read a request gives what one pass over all of it does, beyond the window too.

Once for a model of ours, one of whose layers has no window, and once for transformers' Mixtral, whose logits are the
reference.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import BASE_SLOT
from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models import cache_rows, decoder
from jax_moe_lora.models.cache import Cache
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.params import ModelParams, init_params
from jax_moe_lora.models.specs.model import ModelConfig
from support.layers import assert_close
from support.models import decoder_config
from support.networks import peft_logits, save_model, tiny

WINDOW, LENGTH, ROWS = 5, 28, 3
EVERY_ROW = np.arange(ROWS)
# Shorter than the window, as long, and several windows long.
PROMPTS = np.array([3, WINDOW, 12])
MOE = MoEConfig(32, 24, 4, 2, renormalize=True)
TOKENS = np.random.default_rng(0).integers(0, 64, (ROWS, LENGTH)).astype(np.int32)
SLOTS = jnp.full(ROWS, BASE_SLOT)


def windowed(layers: int, window: int | None = WINDOW) -> tuple[ModelConfig, ModelParams]:
    """A random model whose logits differ clearly."""
    config = decoder_config("mixtral", 64, 32, (4, 2, 8), MOE, (True,) * layers, qk_norm=None, window=window)
    params = init_params(config, jax.random.key(0), "float32")
    return config, jax.tree.map(lambda leaf: 10 * leaf if leaf.ndim > 1 else leaf, params)


@dataclass(frozen=True)
class Case:
    """A model, and its logits at every position of `TOKENS`."""

    config: ModelConfig
    params: ModelParams
    expected: np.ndarray

    def run(self, function: Any, cache: Cache, *arguments: Any) -> tuple[Cache, np.ndarray]:
        cache, logits = jax.jit(function, static_argnames="config")(
            self.params, None, cache, *map(jnp.asarray, arguments), config=self.config
        )
        return cache, np.asarray(logits)

    def after(self, lengths: np.ndarray, rows: Any = EVERY_ROW) -> np.ndarray:
        """The logits that are expected after so many tokens of these rows."""
        return self.expected[rows, lengths - 1]

    def check_decoding(self, cache: Cache, lengths: np.ndarray, steps: int) -> Cache:
        """Each next token's logits are the expected ones."""
        for places in (lengths + step for step in range(steps)):
            cache, logits = self.run(decoder.decode, cache, TOKENS[EVERY_ROW, places], SLOTS)
            assert_close(logits, self.after(places + 1), 1e-5)
        return cache


def mixed_layers(_: Path) -> Case:
    config, params = windowed(2)
    whole = replace(config.layers[1], attention=replace(config.layers[1].attention, window=None))
    config = replace(config, layers=(config.layers[0], whole))
    return Case(config, params, np.asarray(logits_of(config, params, TOKENS)))


def mixtral(folder: Path) -> Case:
    base = save_model(tiny("mixtral", num_hidden_layers=2, sliding_window=WINDOW), folder)
    config = read_model_config(base)
    return Case(config, load_params(base, config, "float32"), peft_logits(base, None, TOKENS))


def logits_of(config: ModelConfig, params: ModelParams, tokens: np.ndarray) -> jax.Array:
    run = jax.jit(partial(decoder.logits, config=config))
    return run(params, None, jnp.asarray(tokens), jnp.full(len(tokens), tokens.shape[1]), SLOTS[: len(tokens)])


@pytest.fixture(scope="module", params=[mixed_layers, pytest.param(mixtral, marks=pytest.mark.parity)])
def case(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("windows"))


def new_cache(case: Case, max_length: int = LENGTH) -> Cache:
    return decoder.init_cache(case.config, ROWS, max_length, "float32")


@pytest.mark.slow
@pytest.mark.optimised
def test_a_token_sees_itself_and_those_before_it_that_the_window_holds():
    config, params = windowed(1)
    changed = TOKENS[:1].copy()
    changed[0, 7] = (changed[0, 7] + 1) % 64
    before, after = (np.asarray(logits_of(config, params, tokens)) for tokens in (TOKENS[:1], changed))
    differ = np.flatnonzero((before != after).any(axis=(0, 2)))
    np.testing.assert_array_equal(differ, np.arange(7, 7 + WINDOW))


@pytest.mark.slow
@pytest.mark.optimised
def test_a_window_as_long_as_the_prompt_is_none():
    config, params = windowed(1, window=LENGTH)
    whole = replace(config.layers[0], attention=replace(config.layers[0].attention, window=None))
    np.testing.assert_array_equal(
        logits_of(config, params, TOKENS), logits_of(replace(config, layers=(whole,)), params, TOKENS)
    )


def test_the_cache_of_a_layer_has_as_many_places_as_its_window():
    config, _ = windowed(1)
    places = {length: decoder.init_cache(config, 1, length, "float32").layers[0]["k"].shape[1] for length in (3, 5, 99)}
    assert places == {3: 3, 5: WINDOW, 99: WINDOW}


@pytest.mark.slow
def test_one_pass_gives_the_logits_at_every_position(case):
    assert_close(np.asarray(logits_of(case.config, case.params, TOKENS)), case.expected, 1e-5)


@pytest.mark.slow
def test_decoding_goes_on_beyond_the_window(case):
    cache, logits = case.run(decoder.prefill, new_cache(case), TOKENS[:, : PROMPTS.max()], PROMPTS, SLOTS)
    assert_close(logits, case.after(PROMPTS), 1e-5)
    case.check_decoding(cache, PROMPTS, 3 * WINDOW + 1)


@pytest.mark.slow
def test_a_cache_without_room_for_a_window_gives_the_same(case):
    short = np.minimum(PROMPTS, 2)
    cache, logits = case.run(decoder.prefill, new_cache(case, WINDOW - 1), TOKENS[:, :2], short, SLOTS)
    assert_close(logits, case.after(short), 1e-5)
    case.check_decoding(cache, short, 2)


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, WINDOW, 2 * WINDOW + 1])
def test_chunks_give_what_the_whole_does(case, width):
    """Chunks shorter and longer than the window, each row another share of them, some with none."""
    cache, read = new_cache(case), np.zeros(ROWS, int)
    while read.min() < LENGTH - WINDOW:
        lengths = np.minimum(np.maximum(width - np.roll(EVERY_ROW, read.sum()), 0), LENGTH - WINDOW - read)
        index = np.minimum(read[:, None] + np.arange(width), LENGTH - 1)
        chunk = np.take_along_axis(TOKENS, index, axis=1)
        cache, logits = case.run(decoder.append, cache, chunk, lengths, SLOTS)
        read = read + lengths
        there = lengths > 0
        assert_close(logits[there], case.after(np.maximum(read, 1))[there], 1e-5)
    case.check_decoding(cache, read, WINDOW)


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [2, 2 * WINDOW + 2])
def test_a_prompt_joins_running_rows_whatever_its_row_held(case, prompt):
    """Row 1 held what is not finite; rows 0 and 2 go on as they were."""
    cache, _ = case.run(decoder.prefill, new_cache(case), TOKENS[:, : PROMPTS.max()], PROMPTS, SLOTS)
    cache = case.check_decoding(cache, PROMPTS, WINDOW)
    cache = replace(cache, layers=jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), cache.layers))
    lengths = PROMPTS + WINDOW
    cache, logits = case.run(
        cache_rows.insert_rows, cache, np.array([1]), TOKENS[1:2, :12], np.array([prompt]), SLOTS[:1]
    )
    lengths[1] = prompt
    assert_close(logits, case.after(lengths[1:2], 1), 1e-5)
    more, rows = TOKENS[[1, 1], prompt : prompt + 7], np.array([1, ROWS])  # and a row that the cache does not have
    cache, logits = case.run(cache_rows.append_rows, cache, rows, more, np.array([7, 7]), SLOTS[:2])
    lengths[1] += 7
    assert_close(logits[0], case.after(lengths[1:2], 1)[0], 1e-5)
    case.check_decoding(cache, lengths, WINDOW + 1)


@pytest.mark.slow
def test_a_full_request_no_longer_writes_and_the_others_go_on(case):
    most = int(PROMPTS.max())
    cache, _ = case.run(decoder.prefill, new_cache(case, most), TOKENS[:, :most], PROMPTS, SLOTS)
    full = jax.tree.map(lambda leaf: np.asarray(leaf[2]), cache.layers)
    others = PROMPTS[:2]
    for places in (others + step for step in range(WINDOW)):
        tokens = np.append(TOKENS[np.arange(2), places], 1).astype(np.int32)
        cache, logits = case.run(decoder.decode, cache, tokens, SLOTS)
        assert_close(logits[:2], case.after(places + 1, np.arange(2)), 1e-5)
    cache, _ = case.run(decoder.append, cache, TOKENS[:, :2], np.array([0, 0, 2]), SLOTS)
    for before, after in zip(jax.tree.leaves(full), jax.tree.leaves(cache.layers), strict=True):
        np.testing.assert_array_equal(after[2], before)
