"""One training line as token ids, with a mask of those that count in the loss.

A conversation is encoded as a server will read it: each answer follows the tokens that its prompt has when the model is
asked for that answer. Turns whose tokens continue those of the turns before are one example. A template that rewrites
earlier turns, such as one that removes reasoning from them, gives several examples.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jax_moe_lora.errors import InputError
from jax_moe_lora.files.text import check_unicode
from jax_moe_lora.files.tokenizer import Tokenizer
from jax_moe_lora.training.forms import PAIR, TEXT, Conversation, ExtraColumns, conversation_of, extra_columns, form_of

Tokens = tuple[list[int], list[bool]]
"""Token ids, and for each whether it counts in the loss."""


@dataclass(frozen=True)
class Example:
    """One sequence to train on.

    Attributes:
      tokens: int32 `[N]`, N at least 2.
      loss_mask: bool `[N]`, the tokens that count in the loss: at least one, and never the first.
    """

    tokens: Int[np.ndarray, "N"]
    loss_mask: Bool[np.ndarray, "N"]

    @property
    def width(self) -> int:
        """Positions that it takes in a row: the last token is only ever a target."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Encoder:
    """Makes examples of lines.

    Attributes:
      tokenizer: the model's.
      eos_token_ids: the tokens that end an answer; the first is appended where a line has none. Empty appends nothing.
      vocab_size: V, above every token id.
      width: the most positions that an example may take.
      extra_columns: `refuse` or `ignore` fields that a line's form does not have.
    """

    tokenizer: Tokenizer
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    width: int
    extra_columns: ExtraColumns = "refuse"

    def examples(self, line: Any) -> tuple[list[Example], list[str]]:
        """The examples of a line.

        Args:
          line: what a line of JSON holds.

        Returns:
          At least one example, and the names of the columns that were ignored.

        Raises:
          InputError: it cannot be trained on; the sentence goes on after the line's name.
          CheckpointError: it is a conversation, and the model has no chat template.
        """
        form = form_of(line)
        extra = extra_columns(line, form)
        if extra and self.extra_columns == "refuse":
            raise InputError(f"has the extra column{'s' * (len(extra) > 1)} {', '.join(extra)[:200]}")
        if form in (TEXT, PAIR):
            sequences = [self._text({name: line[name] for name in form.required})]
        else:
            sequences = self._conversation(conversation_of(line, form))
        return [self._example(tokens, loss_mask) for tokens, loss_mask in sequences], extra

    def end_tokens(self, examples: Iterable[Example]) -> frozenset[int]:
        """The special tokens with which answers of these examples end."""
        last = {
            int(token)
            for example in examples
            for token in example.tokens[example.loss_mask & ~np.append(example.loss_mask[1:], False)]
        }
        return frozenset(last & {*self.tokenizer.special_tokens.values(), *self.eos_token_ids})

    def _text(self, texts: Mapping[str, Any]) -> Tokens:
        _check_texts(texts)
        counted = "text" if "text" in texts else "completion"
        if counted == "text":
            before, after = list[int](), self.tokenizer.encode(texts["text"])
        else:
            before, after = self.tokenizer.encode_pair(texts["prompt"], texts["completion"])
            if not before:
                raise InputError('has a prompt without tokens; give {"text": "..."} to learn all of a text')
        if not after:
            raise InputError(f"has a {counted} without tokens")
        after = self._ended(texts[counted], after)
        return before + after, [False] * len(before) + [True] * len(after)

    def _conversation(self, conversation: Conversation) -> list[Tokens]:
        if self.tokenizer.chat_template.marks_answers:
            return [self._marked(conversation)]
        return list(self._by_turns(conversation))

    def _marked(self, conversation: Conversation) -> Tokens:
        """The whole conversation; the text that the template marks counts in the loss."""
        pieces = self.tokenizer.chat_template.render_marked(
            conversation.messages, conversation.tools, conversation.chat_template_kwargs
        )
        ids, offsets = self.tokenizer.encode_with_offsets("".join(text for text, _ in pieces))
        is_marked = np.repeat([marked for _, marked in pieces], [len(text) for text, _ in pieces])
        return ids, [bool(is_marked[begin:end].any()) for begin, end in offsets]

    def _by_turns(self, conversation: Conversation) -> Iterator[Tokens]:
        """Each answer behind the tokens of its prompt."""
        template, names = self.tokenizer.chat_template, (conversation.tools, conversation.chat_template_kwargs)
        tokens, loss_mask = list[int](), list[bool]()
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            if index == 0:
                raise InputError("begins with an assistant turn, which answers nothing")
            before_text = template.render(conversation.messages[:index], *names, add_generation_prompt=True)
            through = template.render(conversation.messages[: index + 1], *names)
            if not through.startswith(before_text):
                raise InputError(
                    f"has message {index + 1}, which the chat template {template.file} does not begin as it begins an "
                    "answer; give chat_template_kwargs with which it does, such as enable_thinking, or mark answers "
                    "in the template by {% generation %}"
                )
            answer = through[len(before_text) :]
            before, after = self.tokenizer.encode_pair(before_text, answer, add_special_tokens=False)
            after = self._ended(answer, after)
            if before[: len(tokens)] != tokens:  # the template has rewritten earlier turns
                yield tokens, loss_mask
                tokens, loss_mask = [], []
            loss_mask = loss_mask + [False] * (len(before) - len(tokens)) + [True] * len(after)
            tokens = before + after
        yield tokens, loss_mask

    def _ended(self, text: str, tokens: list[int]) -> list[int]:
        """The tokens of a text, with EOS behind them; or up to the special token that ends a turn, where it does."""
        if tokens[-1] in self.eos_token_ids:
            return tokens
        if not text.rstrip().endswith(tuple(self.tokenizer.special_tokens)):
            return tokens + list(self.eos_token_ids[:1])
        special_ids = set(self.tokenizer.special_tokens.values())
        return tokens[: max(index for index, token in enumerate(tokens) if token in special_ids) + 1]

    def _example(self, tokens: list[int], loss_mask: list[bool]) -> Example:
        if len(tokens) < 2:
            raise InputError("has one token, which nothing precedes")
        if len(tokens) - 1 > self.width:
            raise InputError(f"has {len(tokens)} tokens; at most {self.width + 1} fit (--sequence-length {self.width})")
        if max(tokens) >= self.vocab_size:
            raise InputError(f"has token {max(tokens)}, which the model's {self.vocab_size} tokens do not include")
        counts = np.array(loss_mask)
        counts[0] = False
        if not counts.any():
            raise InputError("has no token to learn")
        return Example(np.asarray(tokens, np.int32), counts)


def _check_texts(texts: Mapping[str, Any]) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"has {name} of type {type(text).__name__}; expected a string")
        if not text and name != "prompt":
            raise InputError(f"has an empty {name}")
        check_unicode(text, f"has a {name} that")
