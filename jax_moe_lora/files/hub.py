"""A local folder for a path or a hub id."""

import os
import re
from pathlib import Path

from jax_moe_lora.errors import CheckpointError, InputError

_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def local_folder(path: str | Path) -> Path:
    """The folder itself, or a snapshot of the hub repository of that name.

    Args:
      path: a folder, or a hub id such as `owner/name`.

    Returns:
      A local folder.

    Raises:
      CheckpointError: there is no such folder, and the hub does not provide such a repository.
      InputError: not a path.
    """
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise InputError(f"The folder is {path!r}; give a path, or a hub id such as 'Qwen/Qwen3-30B-A3B'.")
    folder = Path(path)
    if os.path.isdir(folder):  # unlike Path.is_dir, False for a name that is too long
        return folder
    if os.path.exists(folder):
        raise CheckpointError(f"{folder} is a file; expected a folder with config and safetensors files.")
    if not isinstance(path, str) or not _may_be_hub_id(path):
        raise CheckpointError(f"There is no folder {folder}; give a folder, or a hub id such as 'Qwen/Qwen3-30B-A3B'.")
    # Imported here: most uses are local, and the import takes a while.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=_PATTERNS))
    except Exception as error:  # the hub's client raises many kinds, some of its HTTP library's own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is no local folder, and the hub did not give it: {reason}") from error


def _may_be_hub_id(path: str) -> bool:
    """`owner/name`, where no folder `owner` stands: then the path is a mistyped one."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and not os.path.isdir(Path(path).parent)
