"""What XLA launches for a program on a GPU, read from its dump: inside CUDA graphs (command buffers) and outside."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINE = re.compile(r"^( *)\d+: (k\w+)")
COMMAND_BUFFER = "kCommandBuffer"


@dataclass
class Thunks:
    """Counts by kind. `graphs`: command buffers; inside, outside: all other thunks, in one and in none."""

    graphs: int = 0
    inside: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)


def dump_options(folder: Path) -> dict[str, Any]:
    """Compiler options that make XLA write the thunks of a program: `lowered.compile(dump_options(folder))`."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def read_thunks(folder: Path) -> Thunks:
    """Counts the thunks of the one program that was dumped into a folder."""
    (file,) = folder.glob("*thunk_sequence_after_thunk_passes.txt")
    thunks, graph_depth = Thunks(), None
    for line in file.read_text().splitlines():
        if (match := LINE.match(line)) is None:
            continue
        depth, kind = len(match[1]), match[2]
        if graph_depth is not None and depth <= graph_depth:
            graph_depth = None
        if kind == COMMAND_BUFFER:
            thunks.graphs += 1
            graph_depth = depth if graph_depth is None else graph_depth
        else:
            (thunks.outside if graph_depth is None else thunks.inside)[kind] += 1
    return thunks
