"""Which content of an adapter's folder was read: by its files' stamps, and where these differ, by its bytes."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jax_moe_lora.adapters.formats.look_around import WEIGHTS, WEIGHTS_INDEX
from jax_moe_lora.adapters.formats.peft_config import CONFIG
from jax_moe_lora.adapters.formats.trtllm import SIDECAR
from jax_moe_lora.adapters.lora import LoRAAdapter
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.safetensors_io import Stamp, open_regular, stamp_of

Stamps = dict[str, Stamp]


@dataclass(frozen=True)
class Version:
    """One content of an adapter's folder.

    Attributes:
      stamps: of the files that the adapter is read from, by name.
      digest: SHA-256 of these files.
    """

    stamps: Stamps
    digest: str


def stamps(folder: Path) -> Stamps:
    """Stamps of an adapter's files, cheap enough to ask for before each request. A missing file has none."""
    present = {name: stamp_of(folder / name) for name in (CONFIG, WEIGHTS, SIDECAR)}
    if present[WEIGHTS] is None:
        present |= {name: stamp_of(folder / name) for name in (WEIGHTS_INDEX, *_shards(folder))}
    return {name: stamp for name, stamp in present.items() if stamp is not None}


def _shards(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    except OSError:
        return []


def version(folder: Path) -> Version:
    """The content of an adapter's folder.

    Args:
      folder: the adapter's.

    Raises:
      AdapterFormatError: a file cannot be read, is not a regular one, or changes meanwhile.
    """
    before = stamps(folder)
    digest = hashlib.sha256()
    for name in before:
        digest.update(name.encode())
        with open_regular(folder / name, AdapterFormatError) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Version(before, digest.hexdigest())


def newer_version(folder: Path, before: Version) -> Version | None:
    """The content of a folder whose files are no longer those that were read; bytes are read only where stamps differ.

    Args:
      folder: the adapter's.
      before: what was read.

    Returns:
      The content, whose digest may still be the same; None where no stamp differs, or the folder is gone.
    """
    now = stamps(folder)
    return None if now == before.stamps or len(now) < len(before.stamps) else version(folder)


def read_with_version(read: Callable[[Path, str], LoRAAdapter], folder: Path, name: str) -> tuple[LoRAAdapter, Version]:
    """An adapter, and the content that it was read from, which is hashed meanwhile.

    Args:
      read: reads an adapter from a folder, under a name.
      folder: the adapter's.
      name: the adapter's.
    """
    with ThreadPoolExecutor(1) as hashing:  # beside the reading, which waits for the same pages of the file
        content = hashing.submit(version, folder)
        return read(folder, name), content.result()
