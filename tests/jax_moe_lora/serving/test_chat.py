"""Conversations in `generate`, `stream`, `chat` and requests' JSONL: the chat template's tokens, and nothing else."""

import json
import shutil
import sys

import pytest

from jax_moe_lora import CheckpointError, InputError, Model
from jax_moe_lora.cli.main import main
from jax_moe_lora.demo.run import data_folder

# Everything said so far, and then the demo's separator: an adapter of the demo answers it as it answers any text.
TEMPLATE = (
    "{% if tools %}{{ tools[0].name }}{% endif %}{{ prefix }}{% for message in messages %}{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
ASKED = [{"role": "user", "content": "abc"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(data_folder() / "model", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    model = Model.from_pretrained(folder, dtype="float32")
    model.load_adapter(data_folder() / "adapters" / "upper", "upper")
    return model


@pytest.mark.slow
def test_messages_and_texts_are_answered_in_one_batch(model):
    prompts = [
        ASKED,
        "abc>",
        model.tokenizer.encode("abc>"),
        {"messages": ASKED, "chat_template_kwargs": {"prefix": "q"}},
    ]
    answers = model.generate(prompts, ["upper", None, "upper", "upper"], max_new_tokens=8)
    assert [answer.text for answer in answers] == ["ABC", "abc", "ABC", "QABC"]
    streamed = [token.text for token in model.stream([ASKED], ["upper"], max_new_tokens=8)]
    assert "".join(streamed) == "ABC"


@pytest.mark.slow
def test_a_chat_goes_on_turn_by_turn_and_streams_through_the_callback(model):
    streamed: list[str] = []
    messages = [*ASKED]
    options = {"max_new_tokens": 8, "callback": lambda _index, _token, text: streamed.append(text)}
    first = model.chat(messages, "upper", **options)
    assert (first.text, "".join(streamed)) == ("ABC", "ABC")
    messages += [first.message, {"role": "user", "content": "d"}]
    assert messages[1] == {"role": "assistant", "content": "ABC"}
    second = model.chat(
        messages, "upper", tools=[{"name": "x"}], chat_template_kwargs={"prefix": "y"}, max_new_tokens=8
    )
    assert second.token_ids == model.generate(["xyabcABCd>"], ["upper"], max_new_tokens=8)[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([{"content": "a"}], "Prompt 1 has message 1 without a role"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": 3}], "Prompt 1 has message 2 without content"),
        ({"messages": []}, "Prompt 1 has no messages"),
        ({"messages": ASKED, "tool": []}, "Prompt 1 has tool; expected messages, tools or chat_template_kwargs"),
        ({"messages": ASKED, "tools": "f"}, "Prompt 1 has tools that are not a list"),
        (
            {"messages": ASKED, "chat_template_kwargs": {"add_generation_prompt": False}},
            "Prompt 1 has add_generation_prompt in chat_template_kwargs, which the template gets in any case",
        ),
        ([{"role": "user", "content": "\ud800"}], "Prompt 1 holds half of a surrogate pair"),
    ],
)
def test_a_bad_conversation_is_one_sentence_that_names_the_prompt(model, prompt, problem):
    with pytest.raises(InputError, match=problem) as refused:
        model.generate(["ab>", prompt])
    assert str(refused.value).endswith(".")


def test_what_is_not_a_conversation_and_a_model_without_a_template_are_refused(model):
    for messages in ("hi", [], ["hi"], {"messages": ASKED}):
        with pytest.raises(InputError, match="messages are not a conversation; expected a list of"):
            model.chat(messages)
    model = Model(model.config, model.params, model.functional(1, 16).bank, data_folder() / "model")
    with pytest.raises(CheckpointError, match=r"has no chat template; put a chat_template\.jinja there"):
        model.chat(ASKED)


@pytest.mark.slow
def test_requests_of_messages_are_answered_beside_those_of_prompts(folder, tmp_path, monkeypatch, capsys):
    requests = [
        {"messages": ASKED, "adapter": "upper"},
        {"prompt": "abcd>"},
        {"messages": ASKED, "chat_template_kwargs": {"prefix": "z"}, "max_new_tokens": 2},
    ]
    file = tmp_path / "requests.jsonl"
    upper = f"upper={data_folder() / 'adapters' / 'upper'}"
    given = ["generate", "--model", str(folder), "--adapter", upper, "--dtype", "float32", "--requests", str(file)]

    def run(lines: list[dict]) -> tuple[list[dict], str]:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        monkeypatch.setattr(sys, "argv", ["jax-moe-lora", *given, "--max-new-tokens", "8"])
        with pytest.raises(SystemExit):
            main()
        written = capsys.readouterr()
        return [json.loads(line) for line in written.out.splitlines()], written.err

    answers, _ = run(requests)
    assert [answer["text"] for answer in answers] == ["ABC", "abcd", "za"]
    assert [answer.get("messages") for answer in answers] == [ASKED, None, ASKED]
    assert run([{"messages": ASKED, "prompt": "a"}])[1].endswith(
        'line 1 has both "prompt" and "messages"; give one of them.\n'
    )
    assert "line 1 has message 1 without a role" in run([{"messages": [{"content": "a"}]}])[1]
