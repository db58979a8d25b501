"""Conversations as text: the chat template that a checkpoint's tokenizer brings.

Templates are Jinja programs written for transformers, which renders them with jinja2 in its sandbox. So does this file,
with the same settings, names and filters, and without the rest of transformers.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_moe_lora.errors import CheckpointError, InputError
from jax_moe_lora.files.messages import Message
from jax_moe_lora.files.safetensors_io import open_regular, read_json
from jax_moe_lora.files.text import check_unicode

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE_FILE, CONFIG_FILE, MORE_TEMPLATES = "chat_template.jinja", "tokenizer_config.json", "additional_chat_templates"
SPECIAL_TOKEN = re.compile(r"\w+_token")
BEGIN_MARK, END_MARK = "generation_begin", "generation_end"  # names by which the tag writes its marks
MAX_TEMPLATE_BYTES = 2**20
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat template.

    Attributes:
      file: where it stands, for errors.
      templates: name -> Jinja source. `default` is used, or `tool_use` where there are tools.
      special_tokens: what templates call the tokenizer's special tokens, such as `bos_token` -> `<s>`.
    """

    file: Path
    templates: Mapping[str, str]
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "ChatTemplate":
        """The chat template of a checkpoint.

        Args:
          folder: the checkpoint, with `chat_template.jinja`, or with `chat_template` in `tokenizer_config.json`.

        Raises:
          CheckpointError: there is none, or it cannot be read.
        """
        config_file = folder / CONFIG_FILE
        config = read_json(config_file, CheckpointError) if config_file.is_file() else {}
        tokens = {name: _token_text(value) for name, value in config.items() if SPECIAL_TOKEN.fullmatch(name)}
        special_tokens = {name: text for name, text in tokens.items() if text is not None}
        file = folder / TEMPLATE_FILE
        if file.is_file():
            more = {other.stem: _text(other) for other in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
            return cls(file, {"default": _text(file)} | more, special_tokens)
        if config.get("chat_template") is None:
            raise CheckpointError(
                f"{folder} has no chat template; put a {TEMPLATE_FILE} there, or give text in place of messages."
            )
        return cls(config_file, _templates(config_file, config["chat_template"]), special_tokens)

    @property
    def marks_answers(self) -> bool:
        """Whether it says by `{% generation %}` which text a model is to learn."""
        return all(GENERATION.search(source) for source in self.templates.values())

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a conversation.

        Args:
          messages: the turns, as `check_messages` returns them.
          tools: JSON schemas of functions that the model may call.
          chat_template_kwargs: further names that the template reads, such as `enable_thinking`.
          add_generation_prompt: end with the beginning of an answer.

        Raises:
          InputError: the template refuses the conversation, or fails on it; the sentence goes on after its name.
          CheckpointError: the template cannot be read.
        """
        return self._render(messages, tools, chat_template_kwargs, add_generation_prompt, "", "")

    def render_marked(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[tuple[str, bool]]:
        """The text of a conversation in pieces, by the template's own marks.

        Args:
          messages: the turns, as `check_messages` returns them.
          tools: JSON schemas of functions that the model may call.
          chat_template_kwargs: further names that the template reads.

        Returns:
          (text, whether the template marks it as the model's), alternating, the first not the model's.

        Raises:
          InputError: as `render`; or the marked text differs from the text without marks.
        """
        begin, end = (f"<{secrets.token_hex(16)}>" for _ in range(2))
        marked = self._render(messages, tools, chat_template_kwargs, False, begin, end)
        pieces = re.split(f"{begin}(.*?){end}", marked, flags=re.DOTALL)
        if "".join(pieces) != self.render(messages, tools, chat_template_kwargs):
            raise InputError(f"cannot be split by the marks of {self.file}, which changes or nests what it marks")
        return [(piece, index % 2 == 1) for index, piece in enumerate(pieces)]

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        chat_template_kwargs: Mapping[str, Any] | None,
        add_generation_prompt: bool,
        begin: str,
        end: str,
    ) -> str:
        template = self._compiled("tool_use" if tools and "tool_use" in self.templates else "default")
        names = {
            **self.special_tokens,
            "documents": None,
            **(chat_template_kwargs or {}),
            "messages": list(messages),
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
            BEGIN_MARK: begin,
            END_MARK: end,
        }
        try:
            text = template.render(names)
        except Exception as error:  # a template is a program of the checkpoint's author and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"is refused by the chat template {self.file}: {reason}") from error
        check_unicode(text, "")
        return text

    def _compiled(self, name: str) -> "Template":
        try:
            return _compile(self.templates[name])
        except ImportError as error:
            raise CheckpointError(f"{self.file} needs jinja2 to be read; install jax-moe-lora[chat].") from error
        except Exception as error:  # jinja2's TemplateSyntaxError, or a RecursionError of its parser
            reason = f"line {getattr(error, 'lineno', '?')}: {' '.join(str(error).split())}"
            raise CheckpointError(f"{self.file} is not a chat template that can be read: {reason}.") from error


def _templates(file: Path, given: Any) -> dict[str, str]:
    """Name -> source, of one template or of a list of named ones."""
    if isinstance(given, str):
        return {"default": given}
    entries = given if isinstance(given, list) else []
    named: dict[Any, Any] = {
        entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, Mapping)
    }
    if "default" not in named or not all(isinstance(source, str) for source in named.values()):
        raise CheckpointError(f"{file}: chat_template is neither a string nor a list with a template named 'default'.")
    return named


def _token_text(token: Any) -> str | None:
    """A special token as text: files give it as a string, or as an object with its `content`."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _text(file: Path) -> str:
    with open_regular(file, CheckpointError) as opened:
        data = opened.read(MAX_TEMPLATE_BYTES + 1)
    if len(data) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{file} has more than {MAX_TEMPLATE_BYTES} bytes; expected a chat template.", file=file)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8 text.", file=file) from error


@lru_cache(maxsize=32)
def _compile(source: str) -> "Template":
    """A template in a sandbox, with what transformers gives templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` ... `{% endgeneration %}`: its body, between two marks that a rendering names."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.Name(name, "load")], lineno=line) for name in (BEGIN_MARK, END_MARK))
            return [begin, *body, end]

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(source)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """As `json.dumps`: jinja2's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)
