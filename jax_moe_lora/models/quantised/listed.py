"""Which modules a config lists as not quantised: `modules_to_not_convert`, `ignore` and their other names.

Published configs spell an entry as a module's whole name, the name of what it is a part of (`model.layers.0.mlp`), its
last names (`mlp.gate`), with `*` for any text (gpt-oss, Model Optimizer), or as a regular expression behind `re:`
(compressed-tensors). Files are not trusted, and some expressions take years to match: of these only the plain ones
are read, of letters, `.`, `.*`, `\\.`, `^` and `$`. The others list nothing here, as entries do that name no module.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import cache

EXPRESSION = "re:"
_PLAIN = re.compile(r"\^?((?:[\w-]|\\\.|\.\*?)*)(\$?)")


@dataclass(frozen=True)
class _Entries:
    """Entries that are looked up quickly: a model has tens of thousands of modules.

    Attributes:
      names: those without patterns.
      patterns: one expression of all others; each is a group of its own.
      spellings: of the patterns, as they are written.
    """

    names: frozenset[str]
    patterns: re.Pattern[str] | None
    spellings: tuple[str, ...]


def listing(module: str, entries: tuple[str, ...]) -> str | None:
    """The entry that lists a module, None where there is none.

    Args:
      module: its name in the file.
      entries: the config's.
    """
    found = _entries(entries)
    parts = module.split(".")
    for index in range(len(parts)):
        for some in (parts[: index + 1], parts[index:]):
            if (name := ".".join(some)) in found.names:
                return name
    match = None if found.patterns is None else found.patterns.match(module)
    return None if match is None or match.lastindex is None else found.spellings[match.lastindex - 1]


@cache
def _entries(entries: tuple[str, ...]) -> _Entries:
    globs = {entry: found for entry in entries if (found := _globs(entry))}
    text = "|".join(f"({'|'.join(map(translate, found))})" for found in globs.values())
    names = frozenset(entry for entry in entries if entry not in globs and not entry.startswith(EXPRESSION))
    return _Entries(names, re.compile(text) if globs else None, tuple(globs))


def _globs(entry: str) -> Sequence[str]:
    """What an entry with a pattern matches, with `*` and `?`; empty for other entries."""
    if not entry.startswith(EXPRESSION):
        return [entry, f"{entry}.*"] if "*" in entry else []
    plain = _PLAIN.fullmatch(entry.removeprefix(EXPRESSION))
    if plain is None:
        return []
    turned = {".*": "*", ".": "?", "\\.": "."}
    text = re.sub(r"\\\.|\.\*?", lambda match: turned[match[0]], plain[1])
    return [text if plain[2] else f"{text}*"]
