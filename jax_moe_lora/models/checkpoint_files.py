"""The safetensors files of a checkpoint: one whole file, or shards and their index."""

from contextlib import ExitStack
from pathlib import Path

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.files.shards import open_shards

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def locate(folder: Path, opened: ExitStack) -> dict[str, TensorFile]:
    """Opens a checkpoint's files.

    Args:
      folder: holds the files.
      opened: the files are open as long as it is.

    Returns:
      Tensor -> the file that holds it, the files in order.

    Raises:
      CheckpointError: there are none, or as `open_shards`.
    """
    files = open_shards(folder, SINGLE, INDEX, opened, CheckpointError)
    if files is None:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        also = f"; {pickled.name} is a pickle, which is never read" if pickled else ""
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{also}.")
    return files
