"""What ends an answer and what comes with it: stop texts and tokens, log-probabilities, several answers, streams."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest

from jax_moe_lora import AdapterFormatError, AdapterInUseError, InputError, Model, SamplingParams, count_compilations
from jax_moe_lora.demo.run import data_folder, load_demo
from jax_moe_lora.serving.answers import GrowingText

pytestmark = [pytest.mark.xdist_group("demo"), pytest.mark.optimised]
FEW = {"pad_to": (4, 16)}  # one shape for all: what a test compiles serves the others
HOT = {"temperature": 10.0, "max_new_tokens": 6, **FEW}


@pytest.fixture(scope="module")
def model() -> Model:
    return load_demo()


@pytest.mark.slow
def test_nothing_compiles_after_a_warm_up(model):
    """The first test: what others compile would hide what a warm-up forgets."""
    penalties = SamplingParams(repetition_penalty=2.0)
    model.compile([4], [16], 8, [SamplingParams(), penalties, SamplingParams(logprobs=0)])
    prompts, names = ["abcdefghijklmn>", "b>", "c>", "d>"], [None, "upper", "sort", None]
    with count_compilations() as count:
        for options in ({}, {"temperature": 0.7, "min_p": 0.2}, {"presence_penalty": 0.2}, {"logprobs": 4}):
            model.generate(prompts, names, max_new_tokens=8, **options)
    assert count.compilations == 0
    with pytest.raises(InputError, match="positions"):
        model.compile([1], [10**6])


def ids(outs) -> list[list[int]]:
    return [out.token_ids for out in outs]


def test_equal_prompts_without_a_seed_get_different_answers_that_can_be_repeated(model):
    first, second = (model.generate(["abcdef>"] * 4, **HOT) for _ in range(2))
    assert len({tuple(answer) for answer in ids(first) + ids(second)}) > 4
    seeds = [out.seed for out in first]
    assert len(set(seeds)) == 4
    assert ids(model.generate(["abcdef>"] * 4, seed=seeds, **HOT)) == ids(first)


def test_one_seed_gives_each_prompt_its_own_and_a_list_is_used_as_given(model):
    together = model.generate(["abcdef>"] * 4, seed=3, **HOT)
    assert ids(together) == ids(model.generate(["abcdef>"] * 4, seed=3, **HOT))
    assert len({tuple(answer) for answer in ids(together)}) > 1
    given = model.generate(["abcdef>"] * 4, seed=[together[2].seed] * 4, **HOT)
    assert ids(given) == [together[2].token_ids] * 4  # whatever the row


def test_sampling_follows_each_requests_seed_alone(model):
    prompts, names = ["abc>", "hello>", "world>", "zyx>"], [None, "upper", "reverse", "sort"]
    first = model.generate(prompts, names, seed=[1, 2, 3, 4], **HOT)
    assert ids(model.generate(prompts, names, seed=[1, 2, 3, 4], **HOT)) == ids(first)
    assert ids(model.generate(prompts, names, seed=[1, 2, 3, 5], **HOT))[:3] == ids(first)[:3]
    moved = model.generate(prompts[::-1], names[::-1], seed=[4, 3, 2, 1], **HOT)
    assert ids(moved)[::-1] == ids(first)


@pytest.mark.slow
def test_n_answers_to_a_prompt_come_with_the_first(model):
    one, several = model.generate(["abcdef>", "hello>"], seed=[7, 8], n=[1, 3], **HOT)
    assert (one.more, len(several.samples)) == ((), 3)
    assert several.samples[0] is several
    assert len({out.seed for out in several.samples}) == 3
    again = model.generate(["hello>"] * 3, seed=[out.seed for out in several.samples], **HOT)
    assert ids(again) == ids(several.samples)
    with pytest.raises(InputError, match="use stream where n is above 1"):
        model.generate(["a>"], n=2, temperature=1.0, callback=print)


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({"stop": "cd"}, "ab", "cd"),
        ({"stop": ["xx", "ef", "de"]}, "abc", "de"),
        ({"stop": "f"}, "abcde", "f"),  # with the last token before the end
        ({"stop": "xyz"}, "abcdef", None),
        pytest.param(
            {"stop": "b", "min_new_tokens": 3}, "abcdef", None, marks=pytest.mark.slow
        ),  # over before it counts
        pytest.param({"stop": "de", "min_new_tokens": 5}, "abc", "de", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_stop_text_ends_the_answer_which_does_not_include_it(model, options, text, reason):
    pieces = []
    (out,) = model.generate(["abcdef>"], max_new_tokens=10, **FEW, **options)
    (streamed,) = model.generate(
        ["abcdef>"],
        max_new_tokens=10,
        callback=lambda index, token, piece: pieces.append(piece),
        **FEW,
        **options,
    )
    assert (out.text, out.finish_reason, out.stop_reason) == (text, "stop", reason)
    assert (streamed.text, "".join(pieces)) == (text, text)
    if reason is not None:
        assert model.tokenizer.decode(out.token_ids).endswith(reason)


def test_what_may_become_a_stop_text_is_held_back_until_it_is_not():
    growing, pieces = GrowingText(lambda tokens: "".join(map(chr, tokens)), ("cde", "dx")), []
    for end in range(1, 7):
        growing.grow([ord(letter) for letter in "abcdff"[:end]], end == 6)
        pieces.append(growing.news(end == 6))
    assert pieces == ["a", "b", "", "", "cdf", "f"]


def test_a_stop_text_that_is_a_special_token_is_found_though_no_text_shows_it(model):
    (out,) = model.generate(["ab>"], max_new_tokens=8, **FEW, ignore_eos=True, stop="<eos>")
    assert (out.text, out.finish_reason, out.stop_reason) == ("ab", "stop", model.tokenizer.encode("<eos>")[0])


@pytest.mark.slow
def test_stop_tokens_end_the_answer_and_end_tokens_can_be_ignored(model):
    c = model.tokenizer.encode("c")[-1]
    (out,) = model.generate(["abcdef>"], max_new_tokens=10, **FEW, stop_token_ids=[c])
    assert (out.text, out.finish_reason, out.stop_reason) == ("ab", "stop", c)
    (out,) = model.generate(["ab>"], max_new_tokens=8, **FEW, ignore_eos=True)
    assert (len(out.token_ids), out.finish_reason) == (8, "length")
    assert out.token_ids[2] in model.config.eos_token_ids
    (out,) = model.generate(["ab>"], max_new_tokens=8, **FEW, min_new_tokens=5)
    assert len(out.token_ids) >= 5
    assert not set(out.token_ids) & set(model.config.eos_token_ids)


@pytest.mark.slow
def test_an_adapters_folder_says_what_ends_its_answers(model, tmp_path):
    shutil.copytree(data_folder() / "adapters" / "upper", tmp_path / "own")
    file, c = tmp_path / "own" / "generation_config.json", model.tokenizer.encode("C")[-1]
    file.write_text(json.dumps({"eos_token_id": [c], "stop_strings": ["E"], "temperature": 0.3}))
    model.register_adapter(tmp_path / "own", "own")
    outs = model.generate(["abcdef>", "bef>", "abcdef>"], ["own", "own", "upper"], max_new_tokens=10, **FEW)
    assert [(out.text, out.stop_reason) for out in outs] == [("AB", None), ("B", "E"), ("ABCDEF", None)]
    (out,) = model.generate(["abcdef>"], ["own"], max_new_tokens=4, **FEW, ignore_eos=True)
    assert out.text == "ABCD"
    file.write_text('{"eos_token_id": "end"}')
    with pytest.raises(AdapterFormatError, match="eos_token_id 'end'; expected 0 to 98"):
        model.generate(["a>"], ["own"])
    bad, good = model.generate(["a>", "a>"], ["own", "upper"], adapter_errors="return", max_new_tokens=2, **FEW)
    assert (type(bad.error), bad.finish_reason, good.text) == (AdapterFormatError, "error", "A")
    model.unload_adapter("own")


@pytest.mark.slow
def test_log_probabilities_are_the_models_own(model):
    names, prompts = ["upper", None], ["abc>", "abc>"]
    options = {"temperature": 2.0, "top_k": 3, "frequency_penalty": 1.0, "seed": [3, 4], "max_new_tokens": 4, **FEW}
    outs = model.generate(prompts, names, logprobs=[5, 0], **options)
    for out, prompt, name, top in zip(outs, prompts, names, (5, 0), strict=True):
        prompt_ids = model.tokenizer.encode(prompt)
        wanted = jax.nn.log_softmax(model.logits([prompt_ids + out.token_ids], [name])[0][len(prompt_ids) - 1 :])
        assert [one.token_id for one in out.logprobs] == out.token_ids
        for row, one in zip(np.asarray(wanted), out.logprobs, strict=False):
            np.testing.assert_allclose(one.logprob, row[one.token_id], atol=1e-4)
            assert [token for token, _ in one.top] == np.argsort(-row, kind="stable")[:top].tolist()
            np.testing.assert_allclose([value for _, value in one.top], -np.sort(-row)[:top], atol=1e-4)
    assert ids(model.generate(prompts, names, **options)) == ids(outs)
    assert model.generate(prompts, names, **options)[0].logprobs is None


@pytest.mark.slow
def test_sampling_params_are_accepted_for_all_prompts_or_one_per_prompt(model):
    prompts = ["abc>", "abcdef>"]
    each = [SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=9, stop="d")]
    assert [out.text for out in model.generate(prompts, sampling_params=each, **FEW)] == ["ab", "abc"]
    assert [out.text for out in model.generate(prompts, sampling_params=each[0], **FEW)] == ["ab", "ab"]
    with pytest.raises(InputError, match="sampling_params came together with top_k; give one or the other"):
        model.generate(prompts, sampling_params=each, top_k=1)
    with pytest.raises(InputError, match="sampling_params has 1 values for 2 prompts"):
        model.generate(prompts, sampling_params=each[:1])
    with pytest.raises(InputError, match="sampling_params is of type int"):
        model.generate(prompts, sampling_params=3)


@pytest.mark.slow
def test_a_row_with_options_changes_no_bit_of_its_neighbours(model):
    """The programs with and without penalties and scores draw the same tokens for a row that uses none."""
    plain = model.generate(["abcdef>", "fedcba>"], seed=[1, 2], **HOT)
    for options in ({"frequency_penalty": [0.0, 2.0]}, {"logprobs": [None, 3]}, {"min_p": [0.0, 0.5], "top_k": [0, 2]}):
        mixed = model.generate(["abcdef>", "fedcba>"], seed=[1, 2], **HOT, **options)
        assert mixed[0].token_ids == plain[0].token_ids


@pytest.mark.slow
def test_a_stream_gives_each_token_and_the_whole_answers_at_their_ends(model):
    options = {"seed": [5, 6], "n": [2, 1], "logprobs": 1, **HOT}
    prompts, names = ["abcdef>", "hello>"], [None, "upper"]
    outs = model.generate(prompts, names, **options)
    texts, answers = {}, {}
    for token in model.stream(prompts, names, **options):
        key = token.index, token.sample
        texts[key] = texts.get(key, "") + token.text
        assert token.logprob.token_id == token.token_id
        if token.answer is not None:
            answers[key] = token.answer
    assert [answers[0, 0], answers[0, 1], answers[1, 0]] == [*map(strip, outs[0].samples), outs[1]]
    assert texts == {key: answer.text for key, answer in answers.items()}


def strip(generation):
    return replace(generation, more=())


def test_a_stream_holds_its_adapters_until_it_ends_and_checks_its_arguments_at_once(model):
    with pytest.raises(InputError, match="temperature"):
        model.stream(["a>"], temperature=-1)
    assert list(model.stream([])) == []
    tokens = model.stream(["abcdef>"], ["sort"], max_new_tokens=6, **FEW)
    next(tokens)
    with pytest.raises(AdapterInUseError, match="'sort' is used by 1"):
        model.unload_adapter("sort")
    tokens.close()
    assert model.adapter_status["sort"].references == 0


def test_an_unknown_keyword_of_any_method_names_the_nearest_one(model):
    for call, keyword, near in (
        (model.generate, "max_tokens", "max_new_tokens"),
        (model.stream, "stop_ids", "stop_token_ids"),
        (model.load_adapter, "name", "adapter_name"),
        (Model.from_pretrained, "num_adapters", "max_adapters"),
        (model.functional, "max_len", "max_length"),
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'; did you mean '{near}'"):
            call(**{keyword: 3})


def test_a_model_shows_what_it_is(model):
    assert repr(model).startswith("Model(qwen3_moe, 3 layers, ")
    assert "float32, adapters in 4 of 8 slots: " in repr(model)
    assert "upper" in repr(model)


@pytest.mark.slow
def test_hidden_rows_are_what_the_head_reads(model):
    tokens, lengths = np.arange(12).reshape(2, 6), [6, 3]
    rows = np.asarray(model.hidden(tokens, ["upper", None], lengths))
    weight = model.params.embedding if model.params.head is None else model.params.head
    assert rows.shape == (2, 6, model.config.moe.hidden_size)
    wanted = np.asarray(model.logits(tokens, ["upper", None], lengths))
    np.testing.assert_allclose(rows[0] @ np.asarray(weight).T, wanted[0], atol=1e-4)
