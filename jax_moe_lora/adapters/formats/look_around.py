"""What a user may have meant, where an adapter's folder lacks a file: what is there, and what to do."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from jax_moe_lora.adapters.formats.peft_config import CONFIG
from jax_moe_lora.errors import AdapterFormatError

WEIGHTS = "adapter_model.safetensors"
WEIGHTS_INDEX = "adapter_model.safetensors.index.json"
_MOST = 5


def adapters_below(folder: Path) -> list[Path]:
    """Folders one level deeper that hold an adapter, as trainers write them: OUT/checkpoint-10, OUT/NAME.

    Args:
      folder: where to look. One that cannot be read has none.

    Returns:
      The folders, those with numbers in the order of these.
    """
    inner = [folder / entry for entry in _entries(folder) if (folder / entry / CONFIG).is_file()]
    return sorted(inner, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path.name)])


def missing_config(folder: Path) -> AdapterFormatError:
    """The error for a folder without `adapter_config.json`.

    Args:
      folder: the folder.
    """
    inner = adapters_below(folder)
    if not folder.is_dir():
        why, found = f"There is no folder {folder}; give an adapter's folder", "no folder"
    elif inner:
        why = f"{CONFIG} is not found in {folder}, which holds {_listed(inner)}: give one of these folders"
        found = f"{len(inner)} adapters one folder deeper"
    elif (folder / "config.json").exists():
        why, found = f"{folder} holds a model, not an adapter; give a folder with {CONFIG}", "config.json"
    else:
        why, found = f"{CONFIG} is not found in {folder}, which {_contents(folder)}", "no such file"
        if any(name.endswith(".safetensors") for name in _entries(folder)):
            why += "; weights alone say neither rank nor scale, so put the config that was saved with them beside them"
    return AdapterFormatError(f"{why}.", file=folder / CONFIG, found=found, expected=CONFIG)


def missing_weights(folder: Path) -> AdapterFormatError:
    """The error for an adapter's folder without weights.

    Args:
      folder: the folder; one without a config lacks that first.
    """
    if not os.path.lexists(folder / CONFIG):
        return missing_config(folder)
    others = [name for name in _entries(folder) if name.endswith((".safetensors", WEIGHTS_INDEX))]
    inner = adapters_below(folder)
    if (folder / "adapter_model.bin").exists():
        why = f"{folder} holds adapter_model.bin, a pickle, which is never read; save it as safetensors"
        found = "adapter_model.bin"
    elif others:
        it = "it, if it is" if len(others) == 1 else "the one that is"
        why = f"{WEIGHTS} is not found in {folder}, which holds {_listed(others)}: rename {it} the adapter"
        found = _listed(others)
    elif inner:
        why = f"{WEIGHTS} is not found in {folder}, which holds {_listed(inner)}: give one of these folders"
        found = f"{len(inner)} adapters one folder deeper"
    else:
        why, found = f"{WEIGHTS} is not found in {folder}, which {_contents(folder)}", "no such file"
    return AdapterFormatError(f"{why}.", file=folder / WEIGHTS, found=found, expected=WEIGHTS)


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.isprintable())
    except (OSError, ValueError):
        return []


def _contents(folder: Path) -> str:
    names = _entries(folder)
    return f"holds {_listed(names)}" if names else "is empty"


def _listed(names: Sequence[object]) -> str:
    shown = [str(name) for name in names[:_MOST]]
    if len(names) > _MOST:
        return f"{', '.join(shown)} and {len(names) - _MOST} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
