"""Weights in one safetensors file, or in several with an index that says which tensor stands where."""

import os
from contextlib import ExitStack
from pathlib import Path

from jax_moe_lora.errors import JaxMoELoRAError
from jax_moe_lora.files.safetensors_io import TensorFile, open_tensors, read_json


def open_shards(
    folder: Path, single: str, index: str, opened: ExitStack, error: type[JaxMoELoRAError]
) -> dict[str, TensorFile] | None:
    """Opens a folder's weights.

    An index whose shards are not all there is stale where a whole file stands beside it: the file is read.

    Args:
      folder: holds the files.
      single: name of the file where there is only one.
      index: name of the index of several, whose `weight_map` names the file of each tensor.
      opened: the files are open as long as it is.
      error: raised for what cannot be read.

    Returns:
      Tensor -> the file that holds it, the files in order; None where there is neither a whole file nor an index.

    Raises:
      error: a file that is missing, corrupt or outside the folder, an index that promises what is not there, a tensor
        in two files, or a whole file beside complete shards, by name.
    """
    if not any(os.path.lexists(folder / name) for name in (single, index)):
        return None
    weight_map = _read_index(folder, single, index, error)
    names = [single] if weight_map is None else sorted(set(weight_map.values()))
    file_of: dict[str, TensorFile] = {}
    for name in names:
        file = opened.enter_context(open_tensors(folder / name, error))
        for tensor in file.infos:
            if tensor in file_of:
                problem = f"{tensor} stands in both {file_of[tensor].path.name} and {name} of {folder}."
                raise error(problem, file=folder / name, key=tensor, found="two files", expected="one")
            file_of[tensor] = file
    for tensor, name in (weight_map or {}).items():
        if tensor not in file_of or file_of[tensor].path.name != name:
            problem = f"{folder / index} promises {tensor} in {name}, which does not hold it."
            raise error(
                problem, file=folder / index, key=tensor, found="no such tensor", expected=f"{tensor} in {name}"
            )
    return file_of


def _read_index(folder: Path, single: str, index: str, error: type[JaxMoELoRAError]) -> dict[str, str] | None:
    """Tensor -> file; None where the whole file is to be read."""
    if not os.path.lexists(folder / index):
        return None
    weight_map = read_json(folder / index, error).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise error(f"{folder / index} has no weight_map of tensor names to shard files.", file=folder / index)
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).is_absolute() or len(Path(shard).parts) != 1 or shard in (".", ".."):
            problem = f"{folder / index} names the shard {shard!r}; expected a file of the same folder."
            raise error(problem, file=folder / index, found=shard, expected="a file of the same folder")
    if not os.path.lexists(folder / single) or single in shards:
        return weight_map
    if all(os.path.lexists(folder / shard) for shard in shards):
        raise error(
            f"{folder} holds its weights twice, in {single} and in the {len(shards)} shards of {index}; remove one of "
            "them.",
            file=folder / index,
        )
    return None
