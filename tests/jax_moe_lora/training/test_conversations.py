"""Conversations as training examples: what is learnt is what a server asks for, behind the tokens that it reads."""

import pytest

from jax_moe_lora.errors import CheckpointError, InputError
from jax_moe_lora.training.data import read_datasets
from jax_moe_lora.training.examples import Encoder
from support.chat import ASKS_FOR_REASONING, HELLO, MARKED, PLAIN, REASONING, WITHOUT_END, save_tokenizer, spelled

EOS = 2
SHAREGPT = {
    "system": "be kind",
    "conversations": [
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
        {"from": "human", "value": "bye"},
        {"from": "gpt", "value": "ciao"},
    ],
}


@pytest.fixture
def encoder(tmp_path):
    def make(template: str | None, **options) -> Encoder:
        return Encoder(save_tokenizer(tmp_path, template), (EOS,), 200, 400, **options)

    return make


def read_back(examples) -> list[list[tuple[bool, str]]]:
    """Of each example: (whether it is learnt, text), in runs."""
    all_runs = []
    for example in examples:
        runs: list[tuple[bool, str]] = []
        for token, learnt in zip(example.tokens, example.loss_mask, strict=True):
            before = runs.pop()[1] if runs and runs[-1][0] == learnt else ""
            runs.append((bool(learnt), before + spelled([token])))
        all_runs.append(runs)
    return all_runs


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


ASKED = "<s>" + turn("system", "be kind") + turn("user", "hi") + "<|im_start|>assistant\n"
AGAIN = "\n" + turn("user", "bye") + "<|im_start|>assistant\n"


@pytest.mark.parametrize("source", [PLAIN, MARKED], ids=["prefixes", "marks"])
def test_assistant_turns_are_learnt_with_their_end_and_nothing_else_is(encoder, source):
    (runs,) = read_back(encoder(source).examples({"messages": HELLO})[0])
    assert runs[:4] == [(False, ASKED), (True, "hello<|im_end|>"), (False, AGAIN), (True, "ciao<|im_end|>")]
    assert runs[4:] in ([], [(False, "\n")])


def test_no_eos_is_learnt_behind_a_turns_own_end(encoder):
    made = encoder(PLAIN)
    for line in (
        {"prompt": "a", "completion": "b<|im_end|>"},
        {"prompt": "a", "completion": "b<|im_end|>\n"},
        {"text": "ab<|im_end|>\n"},
        {"text": "<s>ab</s>"},
    ):
        (example,) = made.examples(line)[0]
        assert spelled(example.tokens).removeprefix("<s>") in ("ab<|im_end|>", "ab</s>")
    for text in ("ab", "a<|im_end|>b", "ab\n", "abé"):  # é is <unk>, a special token that the text does not have
        (example,) = made.examples({"text": text})[0]
        assert example.tokens[-1] == EOS
        assert len(example.tokens) > 2


def test_text_that_begins_with_bos_gets_no_second_one_in_training(tmp_path):
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers.processors import TemplateProcessing

    from jax_moe_lora.files.tokenizer import Tokenizer

    save_tokenizer(tmp_path, PLAIN)
    fast = FastTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(tmp_path / "tokenizer.json"))
    made = Encoder(Tokenizer(tmp_path), (EOS,), 200, 400)
    lines = [
        {"text": "ab"},
        {"text": "<s>ab"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "<s>a", "completion": "b"},
    ]
    assert [spelled(made.examples(line)[0][0].tokens) for line in lines] == ["<s>ab</s>"] * 4
    (example,) = made.examples({"messages": HELLO})[0]
    assert spelled(example.tokens).count("<s>") == 1


def test_each_answer_stands_behind_the_prompt_that_a_server_reads(encoder):
    """A template that removes reasoning from earlier turns: as it is asked later, not as it was answered."""
    made = encoder(REASONING)
    messages = [*HELLO[:2], {"role": "assistant", "content": "hello", "reasoning": "hm"}, *HELLO[3:]]
    examples = made.examples({"messages": messages})[0]
    asked = ASKED.removeprefix("<s>")
    assert read_back(examples) == [
        [(False, asked), (True, "<think>hm</think>hello<|im_end|>")],
        [(False, asked + "hello<|im_end|>" + AGAIN), (True, "<think></think>ciao<|im_end|>")],
    ]
    for example, asked_messages in zip(examples, (messages[:2], messages[:4]), strict=True):
        assert example.tokens[~example.loss_mask].tolist() == made.tokenizer.encode_messages(asked_messages)


def test_an_answer_without_an_end_of_its_own_learns_eos(encoder):
    examples = encoder(WITHOUT_END).examples({"messages": HELLO[1:]})[0]
    assert read_back(examples) == [
        [(False, "user: hi\nassistant: "), (True, "hello\n</s>")],
        [(False, "user: hi\nassistant: hello\nuser: bye\nassistant: "), (True, "ciao\n</s>")],
    ]


def test_an_answer_that_no_prompt_of_the_template_asks_for_is_refused(encoder):
    with pytest.raises(
        InputError, match=r"has message 3, which the chat template .*kwargs .*, or mark answers .* {% generation %}"
    ):
        encoder(ASKS_FOR_REASONING).examples({"messages": HELLO})
    switched = ASKS_FOR_REASONING.replace("<think>", "{% if enable_thinking | default(true) %}<think>{% endif %}")
    line = {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}}
    assert read_back(encoder(switched).examples(line)[0]) == read_back(encoder(PLAIN).examples({"messages": HELLO})[0])
    with pytest.raises(InputError, match="begins with an assistant turn"):
        encoder(PLAIN).examples({"messages": HELLO[2:]})


def test_sharegpt_and_alpaca_lines_are_learnt_as_messages_are(encoder):
    made = encoder(PLAIN)
    expected = read_back(made.examples({"messages": HELLO})[0])
    assert read_back(made.examples(SHAREGPT)[0]) == expected
    assert read_back(made.examples({"conversations": HELLO})[0]) == expected
    alpaca = {"instruction": "add", "input": "1 2", "output": "3"}
    as_messages = [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert read_back(made.examples(alpaca)[0]) == read_back(made.examples({"messages": as_messages})[0])
    short = [{"role": "user", "content": "add"}, as_messages[1]]
    for line in ({"instruction": "add", "output": "3"}, {"instruction": "add", "input": "", "output": "3"}):
        assert read_back(made.examples(line)[0]) == read_back(made.examples({"messages": short})[0])


def test_what_follows_the_last_answer_changes_nothing(encoder):
    made = encoder(PLAIN)
    longer = [*HELLO, {"role": "user", "content": "and?"}]
    assert read_back(made.examples({"messages": longer})[0]) == read_back(made.examples({"messages": HELLO})[0])


BAD = {
    "no answer": ({"messages": HELLO[:2]}, "has no assistant turn"),
    "empty answer": (
        {"messages": [HELLO[1], {"role": "assistant", "content": ""}]},
        "has an empty answer in message 2",
    ),
    "weight": ({"messages": [HELLO[1], HELLO[2] | {"weight": 0}]}, "has message 2 with weight 0"),
    "a role": (
        {"conversations": [{"from": "narrator", "value": "a"}]},
        "has turn 1 from 'narrator'; expected one of human",
    ),
    "no list": ({"conversations": "hi"}, "has conversations of type str"),
    "no value": ({"conversations": [{"from": "human"}]}, "has message 1 without content"),
    "no text": ({"instruction": 3, "output": "a"}, "has instruction of type int; expected a string"),
    "tools": ({"messages": HELLO, "tools": "f"}, "has tools that are not a list"),
    "too long": ({"messages": [HELLO[1], {"role": "assistant", "content": "a" * 500}]}, "tokens; at most 401 fit"),
    "an extra field": ({"messages": HELLO, "id": 1}, "has the extra column id"),
    "a turn's extra field": (
        {"conversations": [{"from": "human", "value": "a", "markdown": None}]},
        "has the extra column conversations.markdown",
    ),
}


@pytest.mark.parametrize(("line", "problem"), BAD.values(), ids=BAD)
def test_a_bad_conversation_is_named(encoder, line, problem):
    with pytest.raises(InputError, match=problem):
        encoder(PLAIN).examples(line)


def test_extra_columns_are_ignored_by_name_on_request(encoder):
    made = encoder(PLAIN, extra_columns="ignore")
    turns = [turn | {"markdown": None} for turn in SHAREGPT["conversations"]]
    lines = [SHAREGPT | {"conversations": turns, "id": 7}, {"text": "a", "source": "web"}, {"text": "b"}]
    dataset = read_datasets({"x": lines}, made)["x"]
    assert dataset.ignored == ("conversations.markdown", "id", "source")
    assert dataset.digest == read_datasets({"x": [SHAREGPT, {"text": "a"}, {"text": "b"}]}, encoder(PLAIN))["x"].digest


def test_a_model_without_a_template_says_so_once(encoder):
    with pytest.raises(CheckpointError, match="has no chat template"):
        read_datasets({"x": [{"messages": HELLO}]}, encoder(None), skip_bad_lines=True)
