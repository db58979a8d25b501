"""A local folder for a path or a hub id."""

import re
from pathlib import Path

from jax_moe_lora.errors import CheckpointError

_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]


def local_folder(path: str | Path) -> Path:
    """The folder itself, or a snapshot of the hub repository of that name.

    Raises:
      CheckpointError: neither a folder nor a repository that the hub gives.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; expected a folder with config and safetensors files.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise CheckpointError(f"There is no folder {folder}; give a folder, or a hub id such as 'Qwen/Qwen3-30B-A3B'.")
    # Imported here: most uses are local, and the import takes a while.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=_PATTERNS))
    except Exception as error:  # the hub's client raises many kinds, some of its HTTP library's own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is no local folder, and the hub did not give it: {reason}") from error
