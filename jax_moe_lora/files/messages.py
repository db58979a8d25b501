"""Conversations: lists of turns, checked before a chat template sees them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jax_moe_lora.errors import InputError

Message = Mapping[str, Any]
"""One turn of a conversation: `role`, `content`, and whatever else a template reads, such as `tool_calls`."""

FOR_TEMPLATE = ("tools", "chat_template_kwargs")
CHAT_FIELDS = ("messages", *FOR_TEMPLATE)
REASONING = ("reasoning_content", "reasoning", "thinking")  # names that templates have for the same field
OWN_NAMES = ("messages", "tools", "add_generation_prompt")  # which a rendering itself gives the template

ChatPrompt = Sequence[Message] | Mapping[str, Any]
"""A conversation to answer: its messages, or an object of `messages`, `tools` and `chat_template_kwargs`."""


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a conversation, and neither text nor token ids."""
    if isinstance(prompt, Mapping):
        return True
    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(turn, Mapping) for turn in prompt)


def chat_fields(prompt: ChatPrompt) -> dict[str, Any]:
    """The `messages` of a conversation, and `tools` and `chat_template_kwargs` where it has them.

    Args:
      prompt: messages, or an object with these fields.

    Raises:
      InputError: other fields, or fields of another type; the sentence goes on after the conversation's name.
    """
    fields = dict(prompt) if isinstance(prompt, Mapping) else {"messages": prompt}
    if unknown := sorted(set(map(str, fields)) - {*CHAT_FIELDS}):
        raise InputError(f"has {', '.join(unknown)[:200]}; expected messages, tools or chat_template_kwargs")
    tools, options = fields.get("tools"), fields.get("chat_template_kwargs")
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InputError("has tools that are not a list of JSON schemas")
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"has chat_template_kwargs of type {type(options).__name__}; expected an object")
    if taken := [name for name in OWN_NAMES if name in (options or {})]:
        raise InputError(f"has {', '.join(taken)} in chat_template_kwargs, which the template gets in any case")
    return {"messages": None} | fields


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The turns of a conversation as plain data, which is all that a template may see.

    Args:
      messages: `{"role", "content"}` objects. Content is a string, or a list of `{"type": "text", "text"}` parts. It
        may be absent beside `tool_calls`.

    Returns:
      Copies whose content is one string, or None; their reasoning stands under every name that templates read.

    Raises:
      InputError: what is wrong with which message; the sentence goes on after the conversation's name.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise InputError('has no messages; expected a list of {"role": "user", "content": "..."}')
    checked = []
    for number, message in enumerate(messages, 1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise InputError(f"has {where} of type {type(message).__name__}; expected an object")
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise InputError(f"has {where} without a role; expected one such as 'user' or 'assistant'")
        try:
            plain = json.loads(json.dumps(dict(message)))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"has {where} with a value that JSON cannot hold: {error}") from error
        checked.append(_with_reasoning(plain) | {"content": _content(where, plain)})
    return checked


def _content(where: str, message: Message) -> str | None:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return None
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"has {where} without content; expected a string")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(f"has {where} with a part of type {kind!r}; this model reads text alone")
    return "".join(part["text"] for part in content)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    given = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if given is None else {**dict.fromkeys(REASONING, given), **message}
