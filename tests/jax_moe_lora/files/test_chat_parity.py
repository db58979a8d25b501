"""Chat templates are rendered, and answers marked, as transformers does it."""

import pytest

from jax_moe_lora.files.messages import check_messages
from jax_moe_lora.training.examples import Encoder
from support.chat import HELLO, MARKED, PLAIN, REASONING, WITHOUT_END, save_tokenizer

pytestmark = pytest.mark.parity

TOOLS = [{"type": "function", "function": {"name": "add", "description": "é <b>", "parameters": {"b": 1, "a": [2]}}}]
CALLS = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]},
    {"role": "tool", "content": "3", "name": "add"},
    {"role": "assistant", "content": "It is 3.", "reasoning_content": "add"},
]
# What templates of checkpoints use: namespaces, macros, filters, tests, loop controls, white space control.
EVERYTHING = """
{%- macro shout(text) -%}
    {{- text | upper | trim -}}
{%- endmacro %}
{%- set state = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set state.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- if tools is defined and tools %}
    <tools>{{ tools | tojson }}{{ tools | tojson(indent=2) }}</tools>
{%- endif %}
{% for message in messages %}
    {% if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {%- for call in message.tool_calls -%}
            <call>{{ call.function.name }}: {{ call.function.arguments | tojson }}</call>
        {%- endfor %}
    {%- elif message['content'] is string %}
        {{- '\\n' + message['role'] + ': ' + message.get('content').split(' ')[-1].strip() + shout(' x ') }}
        {{- message.reasoning_content if message.reasoning_content is defined else '' }}
    {%- endif %}
    {{- eos_token if loop.last else ''.join(['|', '|']) }}{{ state.last > loop.index0 }}
{% endfor %}
{%- if add_generation_prompt and enable_thinking | default(true) %}
<think>
{% endif %}
{{- strftime_now('%Y') }}
"""
CASES = {
    "plain": (PLAIN, HELLO, {}),
    "marked": (MARKED, HELLO, {}),
    "reasoning": (REASONING, CALLS[:1] + CALLS[3:], {}),
    "without end": (WITHOUT_END, HELLO, {}),
    "everything": (EVERYTHING, HELLO, {"enable_thinking": False}),
    "tools": (EVERYTHING, CALLS, {"tools": TOOLS}),
}


@pytest.fixture
def transformers_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    return lambda: AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(("source", "messages", "names"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_rendered_conversation_is_that_of_transformers(
    tmp_path, transformers_tokenizer, source, messages, names, add_generation_prompt
):
    tokenizer = save_tokenizer(tmp_path, source)
    theirs = transformers_tokenizer()
    expected = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **names
    )
    tools, options = names.get("tools"), {name: value for name, value in names.items() if name != "tools"}
    found = tokenizer.chat_template.render(
        check_messages(messages), tools, options, add_generation_prompt=add_generation_prompt
    )
    assert found == expected
    if add_generation_prompt:
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **names)
        assert tokenizer.encode_messages(messages, tools, options) == ids


def test_what_is_learnt_by_marks_is_what_transformers_marks(tmp_path, transformers_tokenizer):
    tokenizer = save_tokenizer(tmp_path, MARKED)
    (example,) = Encoder(tokenizer, (2,), 200, 400).examples({"messages": HELLO})[0]
    expected = transformers_tokenizer().apply_chat_template(HELLO, return_assistant_tokens_mask=True, return_dict=True)
    assert example.tokens.tolist() == expected["input_ids"]
    assert example.loss_mask.tolist() == list(map(bool, expected["assistant_masks"]))
