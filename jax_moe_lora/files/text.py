"""Text that users give, and text files that they name."""

from pathlib import Path

from jax_moe_lora.errors import InputError

BOM = b"\xef\xbb\xbf"
"""The byte order mark that Windows programs put before UTF-8 text; it is no part of the text."""


def read_content(path: Path) -> bytes:
    """What a text file holds, without a byte order mark.

    Args:
      path: the file.

    Returns:
      Its bytes, which may or may not be UTF-8.

    Raises:
      InputError: there is no such file, it is a folder, or the system refuses to read it.
    """
    try:
        return path.read_bytes().removeprefix(BOM)
    except FileNotFoundError as error:
        raise InputError(f"File not found: {path}.") from error
    except IsADirectoryError as error:
        raise InputError(f"{path} is a folder; name a file.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def jsonl_lines(path: Path) -> list[tuple[int, bytes]]:
    """The lines of a JSONL file and their numbers from 1 on, without empty lines. Raises what `read_content` raises."""
    lines = enumerate(read_content(path).split(b"\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def decode(content: bytes, where: str) -> str:
    """The text of UTF-8 bytes.

    Args:
      content: the bytes.
      where: what errors call them.

    Returns:
      The text.

    Raises:
      InputError: the bytes are not UTF-8; it says where.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text at byte {error.start + 1}; save it as UTF-8.") from error


def check_unicode(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can spell and no tokenizer takes.

    Args:
      text: any text.
      where: what errors call it; may be empty, where the sentence goes on after a name.

    Raises:
      InputError: the text cannot be written as UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where} holds half of a surrogate pair, which is not valid Unicode.".lstrip()) from error
