"""How long a regular expression from a file may take: Python's `re` tries every way to split a text among its parts.

A group that is repeated without bound, as in `(a+)+`, has exponentially many ways, and is refused. A bounded one is
as many parts as it has repetitions: `(\\.\\w+){1,3}` takes no longer than `\\.\\w+\\.\\w+\\.\\w+`.
"""

import re
from dataclasses import dataclass

MAX_VARIABLE_PARTS = 8
"""Parts of varying length that a pattern with a repeated group may have, each repetition counted."""

_OPEN = r"\((?:\?(?:P<\w+>|<[=!]|[:=!>]|[aiLmsux-]+:|\(\w+\)))?"
_ATOM = r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[aiLmsux]+\)|\(\?#[^)]*\)|\(\?P=\w+\)"
_QUANTIFIER = r"(?:[*+?]|\{\d+(?:,\d*)?\}|\{,\d*\})[?+]?"
_TOKEN = re.compile(
    rf"(?P<atom>{_ATOM})|(?P<open>{_OPEN})|(?P<close>\))|(?P<choice>\|)|(?P<quantifier>{_QUANTIFIER})|(?P<literal>.)",
    re.DOTALL,
)


@dataclass
class _Group:
    """A group, or the whole pattern, as far as it was read.

    Attributes:
      parts: parts of varying length in the present alternative.
      most: the same, in the alternative before that has most.
      last: parts of varying length in the item before, which a quantifier may follow.
      last_is_group: that item is a group.
      varies: what it matches has more than one form.
      last_varies: the same of the item before.
    """

    parts: int = 0
    most: int = 0
    last: int = 0
    last_is_group: bool = False
    varies: bool = False
    last_varies: bool = False

    def add(self, parts: int, is_group: bool = False, varies: bool = False) -> None:
        self.parts += parts
        self.last, self.last_is_group, self.last_varies = parts, is_group, varies
        self.varies |= varies

    def repeat(self, least: int, most: int | None) -> bool:
        """Applies a quantifier to the last item.

        Args:
          least: repetitions at least.
          most: repetitions at most; None without bound.

        Returns:
          False where it repeats a group without bound.
        """
        if most is not None and most <= 1:
            self.varies |= least < most
            return True
        if self.last_is_group and most is None:
            return False
        each = max(self.last, self.last_varies) * (most or 1)
        self.parts += each + (least != most) - self.last
        self.varies |= least != most
        return True


def is_safe(pattern: str) -> bool:
    """Whether a well-formed pattern has no repeated group that can make a match take for ever."""
    stack, repeated = [_Group()], False
    for token in _TOKEN.finditer(pattern):
        group = stack[-1]
        match token.lastgroup:
            case "open":
                stack.append(_Group())
            case "close" if len(stack) > 1:
                closed = stack.pop()
                stack[-1].add(max(closed.parts, closed.most), is_group=True, varies=closed.varies)
            case "choice":
                group.most, group.parts, group.varies = max(group.most, group.parts), 0, True
            case "quantifier":
                least, most = _bounds(token["quantifier"])
                repeated |= group.last_is_group and most != 1
                if not group.repeat(least, most):
                    return False
            case _:
                group.add(0)
    return not repeated or max(stack[0].parts, stack[0].most) <= MAX_VARIABLE_PARTS


def _bounds(quantifier: str) -> tuple[int, int | None]:
    """The least and the largest number of repetitions; None without bound."""
    if quantifier[0] != "{":
        return (int(quantifier[0] == "+"), 1 if quantifier[0] == "?" else None)
    least, comma, most = quantifier.rstrip("?+")[1:-1].partition(",")
    if not comma:
        return int(least), int(least)
    return int(least or 0), int(most) if most else None
