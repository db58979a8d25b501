"""A checkpoint's tokenizer: `tokenizer.json` through the tokenizers library, anything else through transformers."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from jax_moe_lora.errors import CheckpointError


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, folder: Path):
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                fast = FastTokenizer.from_file(str(file))
            except Exception as error:  # the library raises plain Exception on a malformed file
                raise CheckpointError(f"{file} is not a tokenizer that can be read: {error}") from error
            self._encode = lambda text: fast.encode(text).ids
            self._encode_plain = lambda text: fast.encode(text, add_special_tokens=False).ids
            self._decode = lambda ids: fast.decode(list(ids), skip_special_tokens=True)
            return
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise CheckpointError(
                f"{folder} has no tokenizer.json; install jax-moe-lora[text] for other tokenizers, or pass token ids."
            ) from error
        try:
            slow = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{folder} holds no tokenizer that can be read; pass token ids instead of text."
            ) from error
        self._encode = lambda text: slow(text)["input_ids"]
        self._encode_plain = lambda text: slow(text, add_special_tokens=False)["input_ids"]
        self._decode = lambda ids: str(slow.decode(list(ids), skip_special_tokens=True))

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def encode_pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        """A prompt as `encode` gives it, which is what a server reads, and the tokens that are to follow it.

        Those are the rest of the joint text's tokens, or the completion's own where a token would reach across.
        """
        before, both = self.encode(prompt), self.encode(prompt + completion)
        if both[: len(before)] == before:
            return before, both[len(before) :]
        return before, list(self._encode_plain(completion))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids)


class TextStream:
    """The new text of answers that grow token by token, whole characters at a time.

    A character may be spread over several tokens; until its last one it decodes as U+FFFD and is held back.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._shown: dict[int, int] = {}  # answer -> characters given out

    def take(self, index: int, token_ids: Sequence[int], last: bool) -> str:
        """What answer `index` has to show beyond what was taken before; everything, where no token follows."""
        text = self._decode(token_ids)
        ready = text if last else text.rstrip("\ufffd")
        shown = self._shown.get(index, 0)
        self._shown[index] = max(shown, len(ready))
        return ready[shown:]
