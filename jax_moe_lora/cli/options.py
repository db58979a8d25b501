"""What commands have in common: parts of options, and writing what they were asked for."""

from pathlib import Path

from jax_moe_lora.files.folders import whole_file, writing_to


def write_file(path: Path, text: str) -> None:
    """Writes a file that an option names, whole or not at all.

    Raises:
      InputError: the system refuses to write.
    """
    with writing_to(path):
        whole_file(path, text)
