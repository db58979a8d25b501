"""Names and patterns of a config, looked up in time that does not grow with their number.

A config may name each projection of each expert: 18,432 names for 48 layers of 128 experts. Comparing every key with
every name takes minutes then.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# A pattern without repetition or choice: characters, escaped ones, and dots, which match any character.
_PLAIN = re.compile(r"(?:[\w-]|\\[^\w\s]|\.)+", re.ASCII)
_ANY = "\0"


def suffixes(key: str) -> Iterator[str]:
    """The key itself, and what follows each of its dots."""
    yield key
    at = key.find(".")
    while at >= 0:
        yield key[at + 1 :]
        at = key.find(".", at + 1)


class NameSet:
    """Names as PEFT compares them with a module's: it is called so, or its full name ends in `.name`."""

    def __init__(self, names: Iterable[str]):
        self._names = frozenset(names)

    def __contains__(self, key: str) -> bool:
        return any(suffix in self._names for suffix in suffixes(key))


@dataclass(frozen=True)
class _Shape:
    """What patterns of one length have in common.

    Attributes:
      length: characters that they match.
      wild: which of these may be any character.
    """

    length: int
    wild: tuple[int, ...]

    def masked(self, key: str) -> str | None:
        """The end of a key with its wild characters hidden; None where no pattern of this shape can match there."""
        begin = len(key) - self.length
        if begin < 0 or (begin and key[begin - 1] != "."):
            return None
        characters = list(key[begin:])
        for at in self.wild:
            characters[at] = _ANY
        return "".join(characters)


class PatternTable:
    """Patterns of `rank_pattern` and `alpha_pattern`, each with its value.

    PEFT takes the value of the first pattern, in the config's order, that matches the end of a module's name behind a
    dot, or all of it. Patterns without repetition or choice, which full names are, are found in a dictionary.
    """

    def __init__(self, values: Mapping[str, Any]):
        self.patterns, self.values = list(values), list(values.values())
        self._plain: dict[_Shape, dict[str, list[int]]] = {}
        self._others: list[tuple[int, Callable[[str], Any]]] = []
        for index, pattern in enumerate(self.patterns):
            if _PLAIN.fullmatch(pattern):
                shape, text = _shape(pattern)
                self._plain.setdefault(shape, {}).setdefault(text, []).append(index)
            else:
                self._others.append((index, re.compile(rf"(.*\.)?({pattern})$").match))

    def matching(self, key: str) -> set[int]:
        """The indices of all patterns that match a module's full name."""
        matches = {index for index, match in self._others if match(key)}
        for shape, texts in self._plain.items():
            matches.update(texts.get(shape.masked(key) or "", ()))
        return matches

    def value(self, keys: Iterable[str], default: Any) -> Any:
        """The value of the first pattern that matches.

        Args:
          keys: the full names of a module.
          default: the value if no pattern matches one of them.
        """
        first = min((index for key in keys for index in self.matching(key)), default=None)
        return default if first is None else self.values[first]


def is_plain(pattern: str) -> bool:
    """Whether a pattern has neither repetition nor choice, so that it is well formed."""
    return _PLAIN.fullmatch(pattern) is not None


def _shape(pattern: str) -> tuple[_Shape, str]:
    """A plain pattern's shape, and its text with the wild characters hidden."""
    characters = [_ANY if part == "." else part[-1] for part in re.findall(r"\\.|.", pattern)]
    return _Shape(len(characters), tuple(at for at, c in enumerate(characters) if c == _ANY)), "".join(characters)
