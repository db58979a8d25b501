"""The base model's checkpoint, where a reader needs its tensors of the vocabulary and not its sizes alone."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from jax_moe_lora.adapters.formats.names import any_prefix
from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.files.shards import open_shards

EMBEDDING_WEIGHT, HEAD_WEIGHT = "model.embed_tokens.weight", "lm_head.weight"


def stored_name(files: Mapping[str, TensorFile], name: str) -> str | None:
    """What a checkpoint calls a tensor, which in that of a multimodal model has another name; None if it has none.

    Args:
      files: tensor -> its file.
      name: in a checkpoint of the text model alone.
    """
    return next((spelling for spelling in any_prefix(name) if spelling in files), None)


@dataclass(frozen=True)
class BaseCheckpoint:
    """Where a base model lies.

    Attributes:
      folder: of its config and weights.
      tied: the head is the transposed embedding, as its config says.
    """

    folder: Path
    tied: bool = False

    @classmethod
    def at(cls, folder: Path | None, tied: bool) -> "BaseCheckpoint | None":
        """The checkpoint in a folder; None without one."""
        return None if folder is None else cls(folder, tied)

    def open(self, opened: ExitStack) -> Mapping[str, TensorFile]:
        """Tensor -> the file that holds it; empty where the folder has no weights.

        Args:
          opened: closes the files.
        """
        files = open_shards(self.folder, "model.safetensors", "model.safetensors.index.json", opened, CheckpointError)
        return files or {}
