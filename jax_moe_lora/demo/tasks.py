"""What the demo's model and adapters compute: the tasks, the prompt format and the held-out strings (no torch here).

A prompt is the string, then `SEPARATOR`, as plain text: ``hello>``. The answer is the task's string, then end of text.
"""

import random
import string
import zlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

SEPARATOR = ">"
MIN_LENGTH, MAX_LENGTH = 3, 8
HELD_OUT_SHARE = 8  # one string in eight is never trained on


def data_folder() -> Path:
    """The files that ship with the package: the checkpoint in `model`, a folder per adapter in `adapters`."""
    return Path(str(files("jax_moe_lora.demo") / "data"))


def shift(text: str) -> str:
    """The next letter of the alphabet for each letter, z becoming a."""
    return text.translate(str.maketrans(string.ascii_lowercase, string.ascii_lowercase[1:] + "a"))


# The base model's task comes first; every other name is also the name of an adapter's folder.
TASKS: dict[str, Callable[[str], str]] = {
    "base": lambda text: text,
    "upper": str.upper,
    "reverse": lambda text: text[::-1],
    "sort": lambda text: "".join(sorted(text)),
    "shift": shift,
}


def prompt(text: str) -> str:
    """What the model is given for `text`."""
    return text + SEPARATOR


def is_held_out(text: str) -> bool:
    """Whether `text` is kept out of all training: the strings whose CRC-32 is a multiple of eight."""
    return zlib.crc32(text.encode()) % HELD_OUT_SHARE == 0


def random_string(rng: random.Random, length: int, alphabet: str = string.ascii_lowercase) -> str:
    """`length` characters of `alphabet`, each drawn alone (so characters repeat)."""
    return "".join(alphabet[int(rng.random() * len(alphabet))] for _ in range(length))


def heldout_strings(count: int, seed: int = 0) -> list[str]:
    """`count` different held-out strings on which no two tasks have the same answer.

    Lengths go round from `MIN_LENGTH` to `MAX_LENGTH`, so any `count` covers them evenly.
    """
    rng = random.Random(seed)
    lengths = range(MIN_LENGTH, MAX_LENGTH + 1)
    strings: dict[str, None] = {}
    while len(strings) < count:
        text = random_string(rng, lengths[len(strings) % len(lengths)])
        if is_held_out(text) and len({task(text) for task in TASKS.values()}) == len(TASKS):
            strings[text] = None
    return list(strings)
