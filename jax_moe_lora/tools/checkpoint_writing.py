"""Writing a checkpoint that is made of another one: shards one after the other, its other files copied."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jax_moe_lora.errors import CheckpointError, ConfigError
from jax_moe_lora.files.dtypes import WRITTEN
from jax_moe_lora.files.safetensors_io import TensorFile, read_json
from jax_moe_lora.files.safetensors_writer import Planned, write_made
from jax_moe_lora.models.checkpoint_files import INDEX, SINGLE

# Weights in other forms, which would still be those of the base model.
_OTHER_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".h5",
    ".gguf",
    ".onnx",
)


@dataclass(frozen=True)
class Group:
    """Tensors that are made together and stand in one shard.

    Attributes:
      planned: name -> dtype and shape.
      make: gives each of them, when its turn comes.
    """

    planned: Mapping[str, Planned]
    make: Callable[[], Iterable[tuple[str, np.ndarray]]]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.planned.values())


def copied(name: str, file: TensorFile) -> Group:
    """A tensor as it is, bit for bit.

    Args:
      name: the tensor.
      file: holds it.

    Raises:
      CheckpointError: it has a dtype that is not written.
    """
    info = file.infos[name]
    if info.dtype not in WRITTEN:
        raise CheckpointError(f"{name} in {file.path} has dtype {info.dtype}; expected one of {', '.join(WRITTEN)}.")
    dtype = WRITTEN[info.dtype]
    return Group({name: Planned(dtype, info.shape)}, lambda: [(name, file.get_stored(name, 0, info.shape).view(dtype))])


def write_shards(folder: Path, groups: Sequence[Group], limit: int) -> None:
    """Writes a checkpoint's safetensors files, and their index if there are several.

    Args:
      folder: to write into.
      groups: in the order of the base checkpoint's files, so that each is read once from end to end.
      limit: bytes of a shard; a larger group has a shard to itself.
    """
    shards = _shards(groups, limit)
    for name, members in shards.items():
        planned = {tensor: plan for group in members for tensor, plan in group.planned.items()}
        write_made(folder / name, planned, _made(members))
    if len(shards) > 1:
        weight_map = {tensor: name for name, members in shards.items() for group in members for tensor in group.planned}
        index = {"metadata": {"total_size": sum(group.nbytes for group in groups)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_others(model: Path, folder: Path, **changes: Any) -> None:
    """Copies a checkpoint's other files (config, tokenizer, licence), but for weights in other forms.

    Args:
      model: the base checkpoint.
      folder: to write into.
      changes: fields of `config.json` that have another value.
    """
    for path in sorted(model.iterdir()):
        if path.is_file() and not path.name.endswith(_OTHER_WEIGHTS) and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    if changes:
        raw = read_json(model / "config.json", ConfigError) | changes
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _made(groups: Sequence[Group]) -> Iterator[tuple[str, np.ndarray]]:
    for group in groups:
        yield from group.make()


def _shards(groups: Sequence[Group], limit: int) -> dict[str, list[Group]]:
    shards: list[list[Group]] = []
    room = 0
    for group in groups:
        if not shards or group.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(group)
        room -= group.nbytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": members for n, members in enumerate(shards, 1)}
