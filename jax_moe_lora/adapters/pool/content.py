"""Which content of an adapter's folder was read: by its files' stamps, and where these differ, by its bytes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from jax_moe_lora.adapters.formats.adapter_file import WEIGHTS
from jax_moe_lora.adapters.formats.peft_config import CONFIG
from jax_moe_lora.adapters.formats.trtllm import SIDECAR
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.safetensors_io import Stamp, open_regular, stamp_of

Stamps = dict[str, Stamp]


@dataclass(frozen=True)
class Version:
    """Stamps of the files that an adapter is read from, by name, and their SHA-256."""

    stamps: Stamps
    digest: str


def stamps(folder: Path) -> Stamps:
    """Cheap to ask for before each request. A file that is not there has no stamp."""
    present = {name: stamp_of(folder / name) for name in (CONFIG, WEIGHTS, SIDECAR)}
    return {name: stamp for name, stamp in present.items() if stamp is not None}


def version(folder: Path) -> Version:
    """Raises AdapterFormatError: a file cannot be read, is no regular one, or changes meanwhile."""
    before = stamps(folder)
    digest = hashlib.sha256()
    for name in before:
        digest.update(name.encode())
        with open_regular(folder / name, AdapterFormatError) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Version(before, digest.hexdigest())
