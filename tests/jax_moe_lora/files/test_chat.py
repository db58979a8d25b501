"""Chat templates: where they are read, what they see, and what they may not do."""

import json
import sys

import pytest

from jax_moe_lora.errors import CheckpointError, InputError
from jax_moe_lora.files.chat import ChatTemplate
from jax_moe_lora.files.messages import check_messages, is_chat
from support.chat import HELLO, MARKED, PLAIN, REASONING, save_tokenizer, spelled

TEXT = (
    "<s><|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    "<|im_start|>user\nbye<|im_end|>\n<|im_start|>assistant\nciao<|im_end|>\n"
)


def template(source: str, tmp_path, **special_tokens: str) -> ChatTemplate:
    return ChatTemplate(tmp_path / "chat_template.jinja", {"default": source}, special_tokens)


def test_messages_become_the_tokens_of_the_template_with_one_bos(tmp_path):
    tokenizer = save_tokenizer(tmp_path, PLAIN)
    assert tokenizer.chat_template.render(HELLO) == TEXT
    asked = HELLO[:4]
    assert spelled(tokenizer.encode_messages(asked)) == TEXT.removesuffix("ciao<|im_end|>\n")
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    assert spelled(tokenizer.encode_messages(parts)) == "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_is_read_wherever_checkpoints_have_it(tmp_path):
    config = {"bos_token": {"content": "<s>"}, "eos_token": None, "add_bos_token": True}

    def read(**more):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | more))
        return ChatTemplate.read(tmp_path)

    assert read(chat_template="{{ bos_token }}a").render(HELLO) == "<s>a"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    several = read(chat_template=named)
    assert (several.render(HELLO), several.render(HELLO, [{"name": "f"}])) == ("plain", '[{"name": "f"}]')
    (tmp_path / "chat_template.jinja").write_text("file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more")
    both = read(chat_template="config")
    assert (both.render(HELLO), both.render(HELLO, [{}])) == ("file", "more")


def test_templates_have_the_names_and_filters_that_they_are_written_for(tmp_path):
    source = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.content | tojson }}{% endfor %}"
        "{{ strftime_now('%Y')[:2] }}{{ documents is none }}{{ tools is none }}{{ enable_thinking }}{{ unknown }}"
    )
    text = template(source, tmp_path).render(
        [{"role": "user", "content": "é<"}, {"role": "user", "content": "no"}],
        chat_template_kwargs={"enable_thinking": False},
    )
    assert text == '"é<"20TrueTrueFalse'


def test_reasoning_stands_under_every_name_that_templates_read(tmp_path):
    for name in ("reasoning", "reasoning_content", "thinking"):
        messages = check_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", name: "c"}])
        assert "<think>c</think>b" in template(REASONING, tmp_path).render(messages)


def test_what_a_template_marks_is_found_and_nothing_else_changes(tmp_path):
    marked = template(MARKED, tmp_path, bos_token="<s>")
    pieces = marked.render_marked(HELLO)
    assert [text for text, is_marked in pieces if is_marked] == ["hello<|im_end|>", "ciao<|im_end|>"]
    assert "".join(text for text, _ in pieces) == marked.render(HELLO)
    assert (marked.marks_answers, template(PLAIN, tmp_path).marks_answers) == (True, False)
    shouting = (
        "{% set turn %}{% generation %}{{ messages[0].content }}{% endgeneration %}{% endset %}{{ turn | upper }}"
    )
    with pytest.raises(InputError, match=r"cannot be split by the marks of .*chat_template.jinja"):
        template(shouting, tmp_path).render_marked(HELLO)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused by the chat template .*: roles must alternate"),
        ("{{ messages[9].content.strip() }}", "refused by the chat template .*: .* has no element 9"),
        ("{{ messages.append(1) }}", "refused by the chat template .*: access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "refused by the chat template .*: access to attribute '__class__'"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refused by the chat template .*: Range too big"),
        ("{{ 1 / 0 }}", "refused by the chat template .*: division by zero"),
        ("\\ud800", None),
    ],
)
def test_a_template_that_fails_is_one_sentence(tmp_path, source, problem):
    if problem is None:
        with pytest.raises(InputError, match="half of a surrogate pair"):
            template("{{ messages[0].content }}", tmp_path).render([{"role": "user", "content": "\ud800"}])
        return
    with pytest.raises(InputError, match=problem) as refused:
        template(source, tmp_path).render(check_messages(HELLO))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, "has no chat template; put a chat_template.jinja there"),
        ({"chat_template": 3}, "neither a string nor a list with a template named 'default'"),
        ({"chat_template": [{"name": "rag", "template": "a"}]}, "neither a string nor a list with a template named"),
        ({"chat_template": "{% if %}"}, "tokenizer_config.json is not a chat template that can be read: line 1: "),
    ],
)
def test_a_missing_or_broken_template_is_named(tmp_path, config, problem):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=problem):
        ChatTemplate.read(tmp_path).render(HELLO)


def test_without_jinja2_the_extra_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(CheckpointError, match=r"needs jinja2 to be read; install jax-moe-lora\[chat\]"):
        template("a template that no other test compiles", tmp_path).render(HELLO)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "has no messages"),
        ("hi", "has no messages"),
        ([{"role": "user", "content": "a"}, "b"], "has message 2 of type str; expected an object"),
        ([{"content": "a"}], "has message 1 without a role"),
        ([{"role": "user"}], "has message 1 without content"),
        ([{"role": "user", "content": 3}], "has message 1 without content; expected a string"),
        ([{"role": "user", "content": [{"type": "image", "url": ""}]}], "a part of type 'image'; .* reads text alone"),
        ([{"role": "user", "content": "a", "x": object()}], "has message 1 with a value that JSON cannot hold"),
    ],
)
def test_bad_messages_are_named_by_their_number(messages, problem):
    with pytest.raises(InputError, match=problem):
        check_messages(messages)


def test_a_conversation_is_told_from_text_and_token_ids():
    assert is_chat(HELLO)
    assert is_chat({"messages": HELLO})
    assert not any(map(is_chat, ["abc", [1, 2], [], b"ab", None]))
