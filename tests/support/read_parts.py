"""A checkpoint whose arrays are split over four devices in several ways, and the bytes that are read for it."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.models import checkpoint_tensors
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import load_params
from jax_moe_lora.models.params import abstract_params
from support.meshes import report

WAYS = {"rows": (4096, P("x")), "columns": (4096, P(None, "x")), "short_columns": (1, P(None, "x"))}


def count_what_is_read() -> Counter[str]:
    """Bytes of tensors by the folder of their file, whoever asks for them."""
    read: Counter[str] = Counter()
    plain = TensorFile._fill

    def fill(self: TensorFile, target: memoryview, offset: int) -> None:
        read[self.path.parent.name] += len(target)
        plain(self, target, offset)

    TensorFile._fill = fill
    return read


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    config, read = read_model_config(folder), count_what_is_read()
    whole = load_params(folder, config, "float32")
    reports: dict[str, Any] = {"whole": read.pop(folder.name)}
    mesh = jax.make_mesh((2, 2), ("copies", "x"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shapes = abstract_params(config, "float32")
    for way, (page_bytes, spec) in WAYS.items():
        checkpoint_tensors.PAGE_BYTES = page_bytes
        specs = jax.tree.map(lambda leaf, spec=spec: spec if len(leaf.shape) >= len(spec) else P(), shapes)
        split = load_params(folder, config, "float32", jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
        same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), split, whole)
        halves = [
            leaf.addressable_shards[1].data.size * 2 == leaf.size for leaf in jax.tree.leaves(split) if leaf.ndim > 1
        ]
        reports[way] = {"same": all(jax.tree.leaves(same)), "split": all(halves), "read": read.pop(folder.name)}
    report(**reports)
