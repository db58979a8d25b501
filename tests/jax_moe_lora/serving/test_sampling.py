"""Sampling options against their definitions; rows that do not use one keep their bits; one program for every mix."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, InputError, SamplingParams, count_compilations
from jax_moe_lora.serving.requests import PaddedBatch, Request
from jax_moe_lora.serving.sampling import Sampling, adjust, count_prompts, count_tokens, greedy, sample, score_tokens
from jax_moe_lora.serving.sampling_params import fold_seed, params_of_prompts
from jax_moe_lora.serving.stopping import read_adapter_stops

pytestmark = pytest.mark.optimised

VOCABULARY = 24
PROMPT, ANSWER = [3, 4, 5, 3], [5, 7, 7, 7]
STOPS = frozenset({1, 9})
jitted = jax.jit(sample)


def logits_of(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCABULARY)).astype(np.float32)


def batch_of(*params: SamplingParams) -> PaddedBatch:
    return PaddedBatch.make([Request(PROMPT, replace(record, max_new_tokens=8)) for record in params])


def prepared(*params: SamplingParams):
    """Sampling and counts of rows that have read PROMPT and answered ANSWER."""
    batch = batch_of(*params)
    sampling = batch.sampling([STOPS] * len(params), VOCABULARY)
    counts = count_prompts(jnp.asarray(batch.tokens), jnp.asarray(batch.lengths), VOCABULARY)
    for token in ANSWER:
        counts = count_tokens(counts, jnp.full(len(batch.lengths), token))
    return sampling, counts


def penalised(logits: np.ndarray, params: SamplingParams, index: int) -> np.ndarray:
    """The definition, token by token: repetition as CTRL has it, frequency and presence as OpenAI and vLLM do."""
    wanted = logits.astype(np.float64)
    for token in set(PROMPT + ANSWER):
        value = wanted[token]
        wanted[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
    for token in set(ANSWER):
        wanted[token] -= params.frequency_penalty * ANSWER.count(token) + params.presence_penalty
    if index < params.min_new_tokens:
        wanted[list(STOPS)] = -np.inf
    return wanted


def kept(logits: np.ndarray, params: SamplingParams) -> set[int]:
    """The tokens that may be drawn, by the definitions of transformers: top-k, of its rest top-p, of its rest min-p."""
    scaled = logits.astype(np.float64) / params.temperature
    order = np.argsort(-scaled, kind="stable")[: params.top_k or None]
    share = np.exp(scaled[order] - scaled.max())
    before = np.cumsum(share / share.sum()) - share / share.sum()
    order, share = order[before < params.top_p], share[before < params.top_p]
    return set(order[share >= params.min_p * share[0]].tolist())


PENALTIES = [
    SamplingParams(),
    SamplingParams(repetition_penalty=1.7),
    SamplingParams(presence_penalty=0.9),
    SamplingParams(frequency_penalty=0.6),
    SamplingParams(min_new_tokens=5),
    SamplingParams(repetition_penalty=0.5, presence_penalty=-1.0, frequency_penalty=0.3, min_new_tokens=4),
]


def test_penalties_are_those_of_their_definitions():
    sampling, counts = prepared(*PENALTIES)
    logits = logits_of(0, len(sampling.temperature))
    index = np.full(len(logits), len(ANSWER), np.int32)
    found = np.asarray(adjust(jnp.asarray(logits), sampling.adjustments, counts, jnp.asarray(index)))
    for row, params in enumerate(PENALTIES):
        np.testing.assert_allclose(found[row], penalised(logits[row], params, len(ANSWER)), rtol=1e-6, atol=1e-6)


def test_rows_that_use_no_penalty_keep_their_bits():
    sampling, counts = prepared(*PENALTIES)
    logits = logits_of(1, len(sampling.temperature))
    found = adjust(jnp.asarray(logits), sampling.adjustments, counts, jnp.full(len(logits), 4))
    for row in (0, 4, 6, 7):  # none, min_new_tokens that is over, and unused rows
        np.testing.assert_array_equal(
            found[row],
            logits[row] if row != 4 else np.where(np.isin(np.arange(VOCABULARY), list(STOPS)), -np.inf, logits[row]),
        )


NARROWING = [
    {},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.8, "min_p": 0.3},
    {"temperature": 2.0, "min_p": 0.2},
]


@pytest.mark.parametrize("options", NARROWING, ids=str)
def test_top_k_top_p_and_min_p_keep_what_their_definitions_keep(options):
    params = SamplingParams(**{"temperature": 1.0, **options})
    draws, logits = 2048, np.log(np.asarray([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.07], np.float32))
    column = lambda value, dtype: jnp.full(draws, value, dtype)  # noqa: E731
    sampling = Sampling(
        column(params.temperature, jnp.float32),
        column(params.top_k, jnp.int32),
        column(params.top_p, jnp.float32),
        column(params.min_p, jnp.float32),
        jnp.arange(draws, dtype=jnp.uint32),
    )
    drawn = jitted(jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits))), sampling, jnp.zeros(draws, jnp.int32))
    assert set(np.asarray(drawn).tolist()) == kept(logits, params)


def test_temperature_zero_takes_the_most_probable_beside_sampled_rows():
    logits = jnp.asarray([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]])
    sampling = replace(greedy(2), temperature=jnp.asarray([0.0, 1.0]))
    assert int(jitted(logits, sampling, jnp.zeros(2, jnp.int32))[0]) == 1


def test_a_token_follows_from_its_requests_seed_and_its_own_place_alone():
    """Neither the row nor the neighbours, their places, seeds and options, change it."""
    logits = jnp.asarray(np.repeat(logits_of(2, 1), 8, 0))
    index, seed = np.asarray([0, 1, 2, 3, 4, 5, 6, 7], np.int32), np.asarray([9, 9, 9, 8, 8, 8, 7, 7], np.uint32)
    sampling = replace(greedy(8), temperature=jnp.full(8, 2.0), seed=jnp.asarray(seed))
    first = np.asarray(jitted(logits, sampling, jnp.asarray(index)))
    order = np.asarray([3, 7, 0, 1, 6, 2, 5, 4])
    moved = replace(sampling, seed=jnp.asarray(seed[order]), temperature=jnp.full(8, 2.0))
    np.testing.assert_array_equal(jitted(logits, moved, jnp.asarray(index[order])), first[order])
    alone = replace(sampling, temperature=jnp.asarray([2.0] + [0.0] * 7), top_k=jnp.asarray([0] + [1] * 7))
    assert int(jitted(logits, alone, jnp.asarray([0] + [5] * 7))[0]) == first[0]
    assert len(set(first.tolist())) > 2


@pytest.mark.slow
def test_another_mix_of_options_is_the_same_program():
    mixes = [
        [SamplingParams(frequency_penalty=1.0), SamplingParams(temperature=1.0)],
        [SamplingParams(min_new_tokens=2), SamplingParams(temperature=0.5, top_k=3, min_p=0.1, repetition_penalty=2.0)],
    ]
    step = jax.jit(sample)
    with count_compilations():
        sampling, counts = prepared(*mixes[0])
        step(jnp.asarray(logits_of(3, 2)), sampling, jnp.zeros(2, jnp.int32), counts)
    with count_compilations() as count:
        sampling, counts = prepared(*mixes[1])
        step(jnp.asarray(logits_of(4, 2)), sampling, jnp.ones(2, jnp.int32), counts)
    assert count.compilations == 0


def test_scores_are_the_log_probabilities_of_the_models_own_logits():
    logits = logits_of(5, 2)
    wanted = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    scores = score_tokens(jnp.asarray(logits), jnp.asarray([3, 0]))
    np.testing.assert_allclose(scores.chosen, wanted[[0, 1], [3, 0]], rtol=1e-5)
    np.testing.assert_array_equal(scores.ids, np.argsort(-wanted, -1)[:, :20])
    np.testing.assert_allclose(scores.values, -np.sort(-wanted, -1)[:, :20], rtol=1e-5)


def test_seeds_of_prompts_and_samples_are_all_different():
    seeds = [fold_seed(5, kind, index) for kind in ("prompt", "sample") for index in range(1, 200)]
    assert len({5, *seeds}) == 399
    assert fold_seed(5, "prompt", 0) == fold_seed(5, "sample", 0) == 5
    assert fold_seed(5, "prompt", 3) == 3702243260  # in every process, and with every numpy


def test_one_seed_is_folded_a_list_is_used_as_given_and_none_is_drawn():
    seeds = lambda params, options: [record.seed for record in params_of_prompts(3, params, options)]  # noqa: E731
    folded = [5, fold_seed(5, "prompt", 1), fold_seed(5, "prompt", 2)]
    assert seeds(None, {"seed": 5}) == seeds(SamplingParams(seed=5), {}) == folded
    assert seeds(None, {"seed": [5, 5, 6]}) == seeds([SamplingParams(seed=seed) for seed in (5, 5, 6)], {}) == [5, 5, 6]
    drawn = seeds(None, {}) + seeds(SamplingParams(), {}) + seeds(None, {"seed": [None] * 3})
    assert len(set(drawn)) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_p": 1.5}, "min_p is 1.5; expected 0 .off. to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; expected more than 0"),
        ({"presence_penalty": "1"}, "presence_penalty is '1'; expected -1e6 to 1e6"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"min_new_tokens": 65}, "min_new_tokens is 65; expected at most 64, max_new_tokens"),
        ({"n": 0}, "n is 0; expected 1 to 1024"),
        ({"n": 2}, "n is 2 with temperature 0, which gives equal answers"),
        ({"stop": ""}, "stop is ''; expected a text that is not empty"),
        ({"stop": [3]}, r"stop is \[3\]; expected a text"),
        ({"stop": ["a", "\ud83d"]}, "which holds half of a surrogate pair"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids is 1.5; expected a whole number"),
        ({"ignore_eos": 1}, "ignore_eos is 1; expected True or False"),
        ({"logprobs": 21}, "logprobs is 21; expected 0 to 20"),
        ({"seed": 2**32}, "seed is 4294967296; expected 0 to 4294967295"),
    ],
)
def test_bad_sampling_params_are_refused_when_they_are_made(options, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**options)


def test_an_unknown_keyword_names_the_nearest_one():
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_tokens'; did you mean 'max_new_tokens'"):
        SamplingParams(max_tokens=3)
    with pytest.raises(TypeError, match="'qqqq'; known are max_new_tokens, min_new_tokens, temperature"):
        SamplingParams(qqqq=3)


@pytest.mark.parity
def test_penalties_and_narrowing_are_those_of_transformers():
    import torch
    from transformers.generation import logits_process as reference

    params = SamplingParams(temperature=0.7, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.4, min_new_tokens=6)
    sampling, counts = prepared(params)
    logits = logits_of(6, 1)
    found = np.asarray(adjust(jnp.asarray(logits), sampling.adjustments, counts, jnp.asarray([len(ANSWER)])))
    ids = torch.tensor([PROMPT + ANSWER])
    scores = reference.RepetitionPenaltyLogitsProcessor(1.4)(ids, torch.tensor(logits))
    shortest = reference.MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, sorted(STOPS))
    scores = shortest(ids, scores)
    np.testing.assert_allclose(found, scores.numpy(), rtol=1e-6)
    warpers = (
        reference.TemperatureLogitsWarper(0.7),
        reference.TopKLogitsWarper(12),
        reference.TopPLogitsWarper(0.9),
        reference.MinPLogitsWarper(0.05),
    )
    for warp in warpers:
        scores = warp(ids, scores)
    assert kept(found[0], params) == set(np.flatnonzero(np.isfinite(scores.numpy()[0])).tolist())


def test_an_adapters_stop_strings_are_valid_unicode(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"stop_strings": ["a", "\\ud83d"]}')
    with pytest.raises(AdapterFormatError, match="in stop_strings, which holds half of a surrogate pair"):
        read_adapter_stops(tmp_path, 99)
