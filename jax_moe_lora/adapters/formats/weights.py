"""An adapter's weights: `adapter_model.safetensors`, or shards of it with an index."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_moe_lora.adapters.formats.look_around import WEIGHTS, WEIGHTS_INDEX, missing_weights
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.safetensors_header import TensorInfo
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.files.shards import open_shards


@dataclass(frozen=True)
class AdapterTensors:
    """The open weights of an adapter.

    Attributes:
      path: what errors call them: the file, or the index of several.
      files: tensor -> the file that holds it.
    """

    path: Path
    files: Mapping[str, TensorFile]

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Tensor -> its dtype and shape."""
        return {name: file.infos[name] for name, file in self.files.items()}

    def get_tensor(self, name: str) -> np.ndarray:
        return self.files[name].get_tensor(name)


@contextmanager
def open_weights(folder: Path) -> Iterator[AdapterTensors]:
    """The weights of an adapter's folder, which must not change before the block ends.

    Args:
      folder: the adapter's.

    Raises:
      AdapterFormatError: there are none, or a file of them cannot be read, by name.
    """
    with ExitStack() as opened:
        files = open_shards(folder, WEIGHTS, WEIGHTS_INDEX, opened, AdapterFormatError)
        if files is None:
            raise missing_weights(folder)
        paths = {file.path for file in files.values()}
        path = paths.pop() if len(paths) == 1 else folder / (WEIGHTS_INDEX if paths else WEIGHTS)
        yield AdapterTensors(path, files)
