"""The safetensors files of a checkpoint: one whole file, or shards and their index."""

import os
from contextlib import ExitStack
from pathlib import Path

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_io import TensorFile, open_tensors, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def locate(folder: Path, opened: ExitStack) -> dict[str, TensorFile]:
    """Opens a checkpoint's files.

    An index whose shards are not all there is stale where a whole file stands beside it: the file is read.

    Args:
      folder: holds the files.
      opened: the files are open as long as it is.

    Returns:
      Tensor -> the file that holds it, the files in order.

    Raises:
      CheckpointError: a file that is missing, corrupt or outside the folder, an index that promises what is not there,
        a tensor in two files, or two checkpoints in one folder, by name.
    """
    weight_map = _read_index(folder)
    shards = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    file_of: dict[str, TensorFile] = {}
    for shard in shards:
        file = opened.enter_context(open_tensors(folder / shard, CheckpointError))
        for name in file.infos:
            if name in file_of:
                raise CheckpointError(f"{name} stands in both {file_of[name].path.name} and {shard} of {folder}.")
            file_of[name] = file
    for name, shard in (weight_map or {}).items():
        if name not in file_of or file_of[name].path.name != shard:
            raise CheckpointError(f"{folder / INDEX} promises {name} in {shard}, which does not hold it.")
    return file_of


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor -> shard; None where the whole file is the checkpoint."""
    has_single, has_index = os.path.lexists(folder / SINGLE), os.path.lexists(folder / INDEX)
    if not has_index and has_single:
        return None
    if not has_index:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        also = f"; {pickled.name} is a pickle, which is never read" if pickled else ""
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{also}.")
    weight_map = read_json(folder / INDEX, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to shard files.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).is_absolute() or len(Path(shard).parts) != 1 or shard in (".", ".."):
            raise CheckpointError(f"{folder / INDEX} names the shard {shard!r}; expected a file of the same folder.")
    if not has_single or SINGLE in shards:
        return weight_map
    if all(os.path.lexists(folder / shard) for shard in shards):
        raise CheckpointError(
            f"{folder} holds two checkpoints, {SINGLE} and the {len(shards)} shards of {INDEX}; remove one of them."
        )
    return None
