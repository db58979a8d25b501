"""Stacks of all experts, one tensor a side, any of them shared: Tinker's and SGLang's files.

Tinker (tinker-cookbook, `tests/weights/conftest.py`): `<experts>.w1`, `.w3`, `.w2` are gate, up and down. A is
`[E, R, in]`, B `[E, out, R]`; a leading 1 is a side that all experts share: A of w1 and w3, B of w2 as Tinker trains.

SGLang: `<experts>.gate_up_proj` and `.down_proj` in the same form (`gate_proj` and `up_proj` too). One A serves both
halves of `gate_up_proj`; the rows of its B are ordered as in the family's own parameter. An A of rank 2R, as SGLang
holds it in memory, is refused, as every other shape is.

The config beside the file gives `r` and `lora_alpha`, and may name its targets by the spelling of any layout, or not at
all, or as `all-linear`.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial

from jax_moe_lora.adapters.formats.adapter_file import AdapterFile, FileLayout, Pair, Weights
from jax_moe_lora.adapters.formats.names import SGLANG_PARTS, TINKER_PARTS
from jax_moe_lora.adapters.lora import uniform


def read_stacks(file: AdapterFile, pairs: Sequence[Pair], parts: Mapping[str, tuple[str, ...]]) -> Weights:
    """The weights of stacks.

    Args:
      file: what the readers share.
      pairs: A and B, whose paths end in one of `parts`.
      parts: last part of a path -> the modules that the stack holds.
    """
    weights: Weights = {}
    for pair in pairs:
        with file.problems:
            _read_stack(file, pair, parts[pair.path.rpartition(".")[2]], weights)
    return weights


def _read_stack(file: AdapterFile, pair: Pair, modules: Sequence[str], weights: Weights) -> None:
    """Adds the weights of one pair, which holds these modules."""
    experts, _, part = pair.path.rpartition(".")
    site = file.site(pair, *modules)
    counts, out_width = sorted({1, site.num_experts}), len(modules) * site.out_width
    rank = (0, 0, *pair.shape("A"))[-2]  # a tensor of another form is refused by its shape
    a, b = file.load(pair, [(n, rank, site.in_width) for n in counts], [(n, out_width, rank) for n in counts])
    halves = file.names.gate_and_up(b) if len(modules) == 2 else (b,)
    for module, half in zip(modules, halves, strict=True):
        if (pair.layer, module) in weights:
            raise file.duplicate(pair, module)
        names = [f"{experts}.{spelling}" for spelling in (part, *file.names.spellings(module))]
        names += [path for path, dense in file.names.dense_modules() if dense == module]
        scale = file.scale(pair, rank, file.config.targets, *names)
        weights[pair.layer, module] = uniform(a, half, scale, site.num_experts)


def stacks(name: str, parts: Mapping[str, tuple[str, ...]]) -> FileLayout:
    """A layout with one stack of all experts a side.

    Args:
      name: what users call it.
      parts: last part of a path -> the modules that the stack holds.
    """
    return FileLayout(name, re.compile(rf"\.({'|'.join(parts)})"), partial(read_stacks, parts=parts))


TINKER = stacks("Tinker", TINKER_PARTS)
SGLANG = stacks("SGLang", SGLANG_PARTS)
