"""Which content of an adapter's folder was read: by its files' stamps, and where these differ, by its bytes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from jax_moe_lora.errors import AdapterFormatError

FILES = ("adapter_config.json", "adapter_model.safetensors", "lora_layout.json")
Stamps = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Version:
    """Stamps of the files that an adapter is read from (name, inode, bytes, time of change), and their SHA-256."""

    stamps: Stamps
    digest: str


def stamps(folder: Path) -> Stamps:
    """Cheap to ask for before each request. A file that is not there has no stamp."""
    found = []
    for name in FILES:
        try:
            status = (folder / name).stat()
        except OSError:
            continue
        found.append((name, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def version(folder: Path) -> Version:
    """Raises AdapterFormatError: a file cannot be read."""
    before = stamps(folder)
    digest = hashlib.sha256()
    for name, *_ in before:
        digest.update(name.encode())
        try:
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise AdapterFormatError(f"{folder / name} cannot be read: {error}.") from error
    return Version(before, digest.hexdigest())
