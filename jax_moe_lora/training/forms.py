"""The forms that a training line may have, and each as text or as messages.

| form | fields | counts in the loss |
|---|---|---|
| text | `text` | all but the first token |
| pair | `prompt`, `completion` | the completion |
| messages | `messages` | assistant turns |
| ShareGPT | `conversations`, perhaps `system` | turns of `gpt` |
| Alpaca | `instruction`, `output`, perhaps `input`, `system` | the output |

The last three go through a chat template, and may have `tools` and `chat_template_kwargs` for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jax_moe_lora.errors import InputError
from jax_moe_lora.files.messages import FOR_TEMPLATE, chat_fields, check_messages

ExtraColumns = Literal["refuse", "ignore"]
EXPECTED = (
    '{"prompt", "completion"}, {"text"}, {"messages"}, {"conversations"} (ShareGPT) or {"instruction", "output"} '
    "(Alpaca)"
)
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Form:
    """The fields of a form of line: all of `required`, and any of `optional`."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


PAIR, TEXT = Form(("prompt", "completion")), Form(("text",))
MESSAGES = Form(("messages",), FOR_TEMPLATE)
SHAREGPT = Form(("conversations",), ("system", *FOR_TEMPLATE))
ALPACA = Form(("instruction", "output"), ("input", "system", *FOR_TEMPLATE))
FORMS = (PAIR, TEXT, MESSAGES, SHAREGPT, ALPACA)


@dataclass(frozen=True)
class Conversation:
    """A line that a chat template turns into text.

    Attributes:
      messages: as `check_messages` returns them, the last one an assistant's.
      tools: JSON schemas of functions, or None.
      chat_template_kwargs: further names that the template reads, such as `enable_thinking`, or None.
    """

    messages: list[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


def form_of(line: Any) -> Form:
    """The form of a line.

    Args:
      line: what a line of JSON holds.

    Raises:
      InputError: it has none, or several; the sentence goes on after the line's name.
    """
    if not isinstance(line, Mapping):
        raise InputError(f"is of type {type(line).__name__}; expected an object such as {EXPECTED}")
    complete = [form for form in FORMS if {*form.required} <= {*line}]
    if len(complete) > 1:
        listed = " and ".join(", ".join(form.required) for form in complete)
        raise InputError(f"has several forms at once: {listed}; leave one of them out")
    if complete:
        return complete[0]
    for form in FORMS:
        missing = [name for name in form.required if name not in line]
        if len(missing) < len(form.required):
            raise InputError(f"lacks {', '.join(missing)}")
    fields = ", ".join(sorted(map(str, line)))
    raise InputError(f"has {f'only {fields[:200]}' if fields else 'no fields'}; expected {EXPECTED}")


def extra_columns(line: Mapping[str, Any], form: Form) -> list[str]:
    """The names of a line's fields that its form does not have, those of ShareGPT's turns included."""
    extra = {str(name) for name in line if name not in form.required + form.optional}
    if form is SHAREGPT and isinstance(turns := line["conversations"], Sequence):
        fields = {str(name) for turn in turns if isinstance(turn, Mapping) and "from" in turn for name in turn}
        extra |= {f"conversations.{name}" for name in fields - {"from", "value"}}
    return sorted(extra)


def conversation_of(line: Mapping[str, Any], form: Form) -> Conversation:
    """A line of messages, ShareGPT or Alpaca as a conversation.

    Args:
      line: a line of this form.
      form: `MESSAGES`, `SHAREGPT` or `ALPACA`.

    Returns:
      The conversation up to its last assistant turn: nothing after it counts in the loss.

    Raises:
      InputError: what is wrong with it; the sentence goes on after the line's name.
    """
    turns = {MESSAGES: _messages, SHAREGPT: _sharegpt, ALPACA: _alpaca}[form](line)
    fields = chat_fields({"messages": turns} | {name: line[name] for name in FOR_TEMPLATE if name in line})
    messages = check_messages(fields["messages"])
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise InputError("has no assistant turn to train on")
    for index in answers:
        if not (messages[index]["content"] or messages[index].get("tool_calls")):
            raise InputError(f"has an empty answer in message {index + 1}")
    for number, message in enumerate(messages, 1):
        if message.get("weight", 1) != 1:
            raise InputError(
                f"has message {number} with weight {message['weight']}; every assistant turn counts in the loss"
            )
    return Conversation(messages[: answers[-1] + 1], fields.get("tools"), fields.get("chat_template_kwargs"))


def _messages(line: Mapping[str, Any]) -> Any:
    return line["messages"]


def _sharegpt(line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    turns = line["conversations"]
    if isinstance(turns, str | bytes) or not isinstance(turns, Sequence):
        raise InputError(f"has conversations of type {type(turns).__name__}; expected a list of turns")
    return [*_system(line), *(_sharegpt_turn(number, turn) for number, turn in enumerate(turns, 1))]


def _sharegpt_turn(number: int, turn: Any) -> Mapping[str, Any]:
    """`{"from", "value"}` as a message; a turn that is one already stays as it is."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise InputError(f"has turn {number} from {turn['from']!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
    return {"role": role, "content": turn.get("value")}


def _alpaca(line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    texts = {name: line.get(name) for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str) and not (name == "input" and text is None):
            raise InputError(f"has {name} of type {type(text).__name__}; expected a string")
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    return [*_system(line), {"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]


def _system(line: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [{"role": "system", "content": line["system"]}] if line.get("system") else []
