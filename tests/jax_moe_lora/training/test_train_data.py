"""Training data: what a line becomes, which lines are refused and how, and what each step's batch holds."""

import json

import jax
import numpy as np
import pytest

from jax_moe_lora import InputError
from jax_moe_lora.demo.run import data_folder
from jax_moe_lora.errors import TrainingDataError
from jax_moe_lora.files.tokenizer import Tokenizer
from jax_moe_lora.training.data import read_datasets
from jax_moe_lora.training.examples import Encoder, Example
from jax_moe_lora.training.rows import lay_out, make_feed, whole_batches
from jax_moe_lora.training.scoring import Evaluation, evaluate
from pallas_kernels.ops import BASE_SLOT

EOS, VOCABULARY, WIDTH = 2, 99, 12
GOOD = {"prompt": "ab>", "completion": "AB"}
BAD = {
    "no json": (b"{nonsense", "is not valid JSON"),
    "a list": (b"[1]", "holds a JSON list; expected an object"),
    "cut off": (b'{"prompt": "a", "compl', "is not valid JSON"),
    "key twice": (b'{"text": "a", "text": "b"}', "the key 'text' twice"),
    "not utf-8": (b'{"text": "\xff"}', "is not UTF-8 text at byte 11"),
    "lone surrogate": (b'{"text": "a\\ud800"}', "has a text that holds half of a surrogate pair"),
    "nothing": (b"{}", "has no fields"),
    "prompt alone": (b'{"prompt": "a>"}', "lacks completion"),
    "completion alone": (b'{"completion": "A", "id": 3}', "lacks prompt"),
    "input alone": (b'{"instruction": "a", "input": "b"}', "lacks output"),
    "unknown": (b'{"question": "a", "answer": "b"}', "has only answer, question; expected"),
    "both forms": (
        b'{"prompt": "a", "completion": "b", "text": "c"}',
        "several forms at once: prompt, completion and text",
    ),
    "another field": (b'{"prompt": "a", "completion": "b", "id": 3}', "has the extra column id"),
    "other fields": (b'{"text": "b", "url": "", "id": 3}', "has the extra columns id, url"),
    "a number": (b'{"prompt": "a", "completion": 3}', "has completion of type int; expected a string"),
    "null": (b'{"text": null}', "has text of type NoneType; expected a string"),
    "empty completion": (b'{"prompt": "a", "completion": ""}', "has an empty completion"),
    "empty text": (b'{"text": ""}', "has an empty text"),
    "empty prompt": (b'{"prompt": "", "completion": "b"}', "has a prompt without tokens"),
    "too long": (b'{"text": "abcdefghijklm"}', "has 14 tokens; at most 13 fit (--sequence-length 12)"),
}


@pytest.fixture(scope="module")
def encoder():
    return Encoder(Tokenizer(data_folder() / "model"), (EOS,), VOCABULARY, WIDTH)


def text_of(encoder, tokens) -> str:
    return encoder.tokenizer.decode(list(map(int, tokens)))


def only_example(encoder, line) -> Example:
    (example,), ignored = encoder.examples(line)
    assert ignored == []
    return example


def write(path, lines) -> None:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))


def test_a_completion_is_learnt_and_its_prompt_is_not(encoder):
    example = only_example(encoder, GOOD)
    assert text_of(encoder, example.tokens[~example.loss_mask]) == "ab>"
    assert text_of(encoder, example.tokens[example.loss_mask]) == "AB"
    assert (example.tokens[-1], example.loss_mask[-1], example.width) == (EOS, True, 5)


def test_a_text_is_learnt_but_for_its_first_token(encoder):
    example = only_example(encoder, {"text": "hey"})
    assert (text_of(encoder, example.tokens), example.tokens[-1]) == ("hey", EOS)
    assert example.loss_mask.tolist() == [False, True, True, True]


def test_a_completion_follows_its_prompt_as_a_server_reads_it(tmp_path):
    """A token that would reach from the prompt into the completion is not used: no server gives it to the model."""
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing

    vocabulary = {"<s>": 0, "a": 1, "b": 2, "ab": 3, "c": 4, "bc": 5}
    made = Fast(BPE(vocabulary, [("a", "b"), ("b", "c")]))
    made.add_special_tokens(["<s>"])
    made.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("ab") == [0, 3]
    assert tokenizer.encode_pair("a", "b") == ([0, 1], [2])
    assert tokenizer.encode_pair("a", "c") == ([0, 1], [4])
    assert tokenizer.encode_pair("ab", "bc") == ([0, 3], [5])


@pytest.mark.parametrize(("line", "problem"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named_by_its_number(encoder, tmp_path, line, problem):
    file = tmp_path / "x.jsonl"
    write(file, [GOOD, b"", line, GOOD])
    with pytest.raises(InputError) as refused:
        read_datasets({"x": file}, encoder)
    first, problems, advice = str(refused.value).splitlines()
    assert first == "1 line cannot be trained on:"
    assert problems.startswith(f"  {file}, line 3 {problem}" if problem.startswith("lacks") else f"  {file}, line 3 ")
    assert problem in problems
    assert "--skip-bad-lines" in advice


def test_all_bad_lines_of_all_files_are_named_at_once(encoder, tmp_path):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("x", "y")}
    write(files["x"], [line for line, _ in BAD.values()])
    write(files["y"], [GOOD, {"text": ""}])
    with pytest.raises(TrainingDataError) as refused:
        read_datasets(files, encoder)
    message = str(refused.value)
    first, *shown, more, _ = message.splitlines()
    assert first == f"{len(BAD) + 1} lines cannot be trained on:"
    assert shown == [f"  {problem}" for problem in refused.value.problems[:10]]
    assert [f", line {number} " in line for number, line in enumerate(shown, 1)] == [True] * 10
    assert more == f"  and {len(BAD) + 1 - 10} more"
    assert len(refused.value.problems) == len(BAD) + 1
    assert refused.value.problems[-1] == f"{files['y']}, line 2 has an empty text"


def test_bad_lines_are_left_out_on_request_and_counted(encoder, tmp_path):
    files = {name: tmp_path / f"{name}.jsonl" for name in ("x", "y")}
    write(files["x"], [GOOD, *(line for line, _ in BAD.values()), {"text": "z"}])
    write(files["y"], [GOOD])
    found = read_datasets(files, encoder, skip_bad_lines=True)
    assert {name: (len(own.examples), own.skipped) for name, own in found.items()} == {
        "x": (2, len(BAD)),
        "y": (1, 0),
    }
    clean = read_datasets({"x": [GOOD, {"text": "z"}]}, encoder)
    assert found["x"].digest == clean["x"].digest != found["y"].digest


def test_what_no_example_is_left_of_is_refused(encoder, tmp_path):
    file = tmp_path / "x.jsonl"
    write(file, [b"", b"  "])
    with pytest.raises(InputError, match=r"x.jsonl holds no examples; expected lines such as"):
        read_datasets({"x": file}, encoder)
    write(file, [b"1", b"2"])
    with pytest.raises(InputError, match="no examples: all its 2 lines were left out"):
        read_datasets({"x": file}, encoder, skip_bad_lines=True)
    with pytest.raises(InputError, match=r"File not found: .*none.jsonl"):
        read_datasets({"x": tmp_path / "none.jsonl"}, encoder, skip_bad_lines=True)
    with pytest.raises(InputError, match="is a folder; name a file"):
        read_datasets({"x": tmp_path}, encoder)


def test_examples_may_be_objects(encoder):
    assert len(read_datasets({"x": [GOOD]}, encoder)["x"].examples) == 1
    with pytest.raises(InputError, match="The data of 'x', example 2 has an empty text"):
        read_datasets({"x": [GOOD, {"text": ""}, GOOD]}, encoder)
    with pytest.raises(InputError, match="example 1 is of type str"):
        read_datasets({"x": ["abc"]}, encoder)


def test_windows_line_ends_and_byte_order_marks_are_no_problem(encoder, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode() + b"\r\n")
    assert len(read_datasets({"x": file}, encoder)["x"].examples) == 2


def random_examples(count: int, seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    lengths = random.integers(2, WIDTH + 2, count)
    begins = [int(random.integers(1, n)) for n in lengths]
    tokens = [random.integers(3, 99, n).astype(np.int32) for n in lengths]
    return [Example(ids, np.arange(len(ids)) >= begin) for ids, begin in zip(tokens, begins, strict=True)]


@pytest.fixture(params=[True, False], ids=["packing", "padding"])
def feed(request, encoder):
    lines = {name: [{"text": "abcdefgh"[:n]} for n in sizes] for name, sizes in SIZES.items()}
    return make_feed(read_datasets(lines, encoder), batch_size=4, width=WIDTH, packing=request.param, seed=7)


SIZES = {"x": [1, 2, 3, 4, 5, 6, 7, 8], "y": [3, 3], "z": [8]}


def test_rows_of_one_example_each_say_so(feed, request):
    assert feed.batch(0).packed == ("packing" in request.node.name)


def read_back(batch):
    """(slot, tokens with the last target, weights) of every example that a batch holds."""
    found = []
    arrays = [np.asarray(getattr(batch, name)) for name in ("tokens", "positions", "segments", "slots", "targets")]
    for tokens, positions, segments, slots, targets, weights in zip(*arrays, np.asarray(batch.weights), strict=True):
        for segment in range(1, segments.max(initial=0) + 1):
            mine = segments == segment
            np.testing.assert_array_equal(positions[mine], np.arange(mine.sum()))
            np.testing.assert_array_equal(tokens[mine][1:], targets[mine][:-1])
            (slot,) = set(slots[mine])
            found.append((int(slot), (*tokens[mine], targets[mine][-1]), tuple(weights[mine])))
        padding = segments == 0
        assert not tokens[padding].any()
        assert not weights[padding].any()
        assert (slots[padding] == BASE_SLOT).all()
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_every_example_once_and_whole(packing):
    examples = random_examples(200)
    rows = lay_out(examples, WIDTH, packing)
    assert sorted(id(e) for row in rows for e in row) == sorted(map(id, examples))
    assert max(sum(example.width for example in row) for row in rows) <= WIDTH
    filled = sum(example.width for example in examples) / (len(rows) * WIDTH)
    assert filled > 0.9 if packing else len(rows) == 200


def test_a_batch_says_of_each_token_what_the_model_needs(encoder):
    datasets = read_datasets({"x": [GOOD, {"text": "hey"}]}, encoder)
    examples = datasets["x"].examples
    (batch,) = whole_batches(make_feed(datasets, 2, WIDTH, True, 0).adapters, 2, WIDTH)
    assert read_back(batch) == [
        (0, tuple(examples[0].tokens), (0, 0, 1, 1, 1)),
        (0, tuple(examples[1].tokens), (1, 1, 1)),
    ]


def test_adapters_take_turns_and_each_epoch_has_every_row_once(feed):
    expected = {
        own.slot: sorted(
            tuple(row)
            for batch in whole_batches({name: own}, 4, WIDTH)
            for row in np.asarray(batch.tokens)
            if row.any()
        )
        for name, own in feed.adapters.items()
    }
    seen = {slot: [] for slot in expected}
    for step in range(24):
        batch = feed.batch(step)
        slots = np.asarray(batch.slots).max(axis=1)
        assert set(slots) == {0, 1, 2}
        for slot, row in zip(slots, np.asarray(batch.tokens), strict=True):
            seen[int(slot)].append(tuple(row))
    assert {len(rows) for rows in seen.values()} == {32}  # each its share of 24 batches of 4 rows
    counts = {slot: len(rows) for slot, rows in expected.items()}
    for slot, count in counts.items():
        for begin in range(0, 32 - count + 1, count):
            assert sorted(seen[slot][begin : begin + count]) == expected[slot]
    first = [seen[0][begin : begin + counts[0]] for begin in range(0, 32 - counts[0] + 1, counts[0])]
    assert len(set(map(tuple, first))) > 1, "every epoch has the same order"


def test_a_step_has_the_same_batch_whenever_it_is_asked_for(feed, encoder):
    again = make_feed(
        read_datasets({name: [{"text": "abcdefgh"[:n]} for n in sizes] for name, sizes in SIZES.items()}, encoder),
        4,
        WIDTH,
        len(feed.adapters["x"].rows) < 8,
        7,
    )
    forwards = [read_back(feed.batch(step)) for step in range(6)]
    assert [read_back(again.batch(step)) for step in reversed(range(6))] == forwards[::-1]


def test_an_adapters_order_does_not_depend_on_the_others(encoder):
    lines = [{"text": "abcdefgh"[:n]} for n in SIZES["x"]]
    alone = make_feed(read_datasets({"x": lines}, encoder), 2, WIDTH, False, 3)
    beside = make_feed(read_datasets({"y": lines[:3], "x": lines}, encoder), 4, WIDTH, False, 3)
    mine = [[own[1] for own in read_back(beside.batch(step)) if own[0] == 1] for step in range(8)]
    assert mine == [[own[1] for own in read_back(alone.batch(step))] for step in range(8)]


def test_shapes_are_those_of_the_settings_alone(feed):
    shapes = {tuple(leaf.shape for leaf in jax.tree.leaves(feed.batch(step))) for step in range(9)}
    assert shapes == {((4, WIDTH),) * 6}


def test_an_answer_is_exact_where_every_token_that_counts_is(encoder):
    lines = {"x": [GOOD, {"prompt": "c>", "completion": "C"}], "y": [GOOD]}
    feed = make_feed(read_datasets(lines, encoder), 2, WIDTH, True, 0)

    def score(batch):
        """Every target is likeliest, but for the first that counts of x's second example, and prompts."""
        weights, tokens = np.asarray(batch.weights), np.asarray(batch.tokens)
        begins = tokens == encoder.tokenizer.encode("c")[0]
        wrong = np.roll(begins, 1, axis=1)  # the target after "c>", which is its first that counts
        assert weights[wrong].all()
        return np.where(weights > 0, 0.25 + wrong, 100.0), (weights > 0) & ~wrong

    found = evaluate(score, whole_batches(feed.adapters, 2, WIDTH), 3)
    assert found == [Evaluation((5 * 0.25 + 1) / 5, 0.5, 2), Evaluation(0.25, 1.0, 1), None]
