"""A checkpoint's tokenizer: `tokenizer.json` through the tokenizers library, anything else through transformers."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as FastTokenizer

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.chat import ChatTemplate
from jax_moe_lora.files.messages import ChatPrompt, chat_fields, check_messages


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      special_tokens: text -> id of the special tokens, such as BOS or the end of a turn.
    """

    special_tokens: Mapping[str, int]
    _encode_with_offsets: Callable[[str], Encoding] | None = None

    def __init__(self, folder: Path):
        """Reads a checkpoint's tokenizer.

        Args:
          folder: the checkpoint.

        Raises:
          CheckpointError: there is no tokenizer, or it cannot be read.
        """
        self._folder, file = folder, folder / "tokenizer.json"
        if file.is_file():
            fast = _read_fast(file)
            self._encode = lambda text, special: list(fast.encode(text, add_special_tokens=special).ids)
            self._decode = lambda ids: fast.decode(list(ids), skip_special_tokens=True)
            added = fast.get_added_tokens_decoder().items()
            self.special_tokens = {token.content: token_id for token_id, token in added if token.special}
            self._encode_with_offsets = lambda text: fast.encode(text, add_special_tokens=False)
        else:
            slow = _read_with_transformers(folder)
            self._encode = lambda text, special: list(slow(text, add_special_tokens=special)["input_ids"])
            self._decode = lambda ids: str(slow.decode(list(ids), skip_special_tokens=True))
            self.special_tokens = dict(zip(slow.all_special_tokens, slow.all_special_ids, strict=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, with the special tokens that the tokenizer puts around it, such as BOS.

        Text that already begins with them, as a chat template's output does, gets no second ones.

        Args:
          text: any text. The text of a special token inside it becomes that token.
          add_special_tokens: False gives the text's own tokens alone.

        Returns:
          Token ids.
        """
        plain = self._encode(text, False)
        return _add_once(self._encode(text, True), plain) if add_special_tokens else plain

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The text's own tokens, and the characters that each stands for.

        Args:
          text: any text.

        Returns:
          Token ids, and (first character, character behind the last) of each.

        Raises:
          CheckpointError: the checkpoint has no `tokenizer.json`.
        """
        if self._encode_with_offsets is None:
            raise CheckpointError(
                f"{self._folder} has no tokenizer.json, without which tokens have no places in a text."
            )
        encoding = self._encode_with_offsets(text)
        return list(encoding.ids), list(encoding.offsets)

    def encode_pair(self, prompt: str, completion: str, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """A prompt and its completion as a model sees them when it answers.

        Args:
          prompt: encoded by `encode`, as a server does.
          completion: the text that follows.
          add_special_tokens: as in `encode`.

        Returns:
          The prompt's tokens, and the tokens that follow it: the rest of the joint text's tokens, or the completion's
          own tokens where one token would reach across the seam.
        """
        before, both = (self.encode(text, add_special_tokens) for text in (prompt, prompt + completion))
        if both[: len(before)] == before:
            return before, both[len(before) :]
        return before, self.encode(completion, add_special_tokens=False)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template; raises CheckpointError where there is none."""
        return ChatTemplate.read(self._folder)

    def encode_prompt(self, prompt: str | ChatPrompt) -> list[int]:
        """The tokens of a text (`encode`) or of a conversation (`encode_messages`).

        Args:
          prompt: a text, messages, or an object of `messages`, `tools` and `chat_template_kwargs`.

        Raises:
          CheckpointError: there is no chat template for a conversation, or it cannot be read.
          InputError: what is wrong with a conversation; the sentence goes on after its name.
        """
        return self.encode(prompt) if isinstance(prompt, str) else self.encode_messages(**chat_fields(prompt))

    def encode_messages(
        self,
        messages: Any,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The tokens of a conversation that the model is to answer, by the checkpoint's chat template.

        Args:
          messages: `{"role", "content"}` objects.
          tools: JSON schemas of functions that the model may call.
          chat_template_kwargs: further names that the template reads, such as `enable_thinking`.

        Returns:
          Token ids of what the template writes, special tokens included; none are added to it.

        Raises:
          CheckpointError: there is no chat template, or it cannot be read.
          InputError: what is wrong with the messages; the sentence goes on after the conversation's name.
        """
        template, checked = self.chat_template, check_messages(messages)
        text = template.render(checked, tools, chat_template_kwargs, add_generation_prompt=True)
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._decode(token_ids)


def _read_fast(file: Path) -> FastTokenizer:
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception on a malformed file
        raise CheckpointError(f"{file} is not a tokenizer that can be read: {error}") from error
    # The file keeps the truncation and padding of whoever saved it last; neither is part of the model.
    fast.no_truncation()
    fast.no_padding()
    return fast


def _read_with_transformers(folder: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{folder} has no tokenizer.json; install jax-moe-lora[text] for other tokenizers, or pass token ids."
        ) from error
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no tokenizer that can be read; pass token ids instead of text.") from error


def _add_once(full: list[int], plain: list[int]) -> list[int]:
    """Special tokens around a text, but for those that the text itself begins or ends with.

    Args:
      full: special tokens, `plain`, special tokens; or something else, which is returned as it is.
      plain: the text's own tokens.

    Returns:
      The shortest result, where `plain` fits into `full` in several places.
    """
    added, size = len(full) - len(plain), len(plain)
    results = [full]
    for at in range(added + 1 if size else 0):
        if full[at : at + size] == plain:
            before, after = full[:at], full[at + size :]
            before = [] if plain[:at] == before else before
            after = [] if after and plain[-len(after) :] == after else after
            results.append([*before, *plain, *after])
    return min(results, key=len)
