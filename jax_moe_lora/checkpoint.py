"""Checkpoint folders: the config, and sharded safetensors read tensor by tensor into placed arrays."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe_lora.config import ModelConfig
from jax_moe_lora.errors import CheckpointError, ConfigError
from jax_moe_lora.models.params import ModelParams, abstract_params
from jax_moe_lora.models.registry import family
from jax_moe_lora.safetensors_io import DTYPES, TensorInfo, open_tensors, read_json, tensor_infos

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_BYTES = 32 * 2**20
ALIGNMENT = 64


def read_model_config(folder: Path) -> ModelConfig:
    """The model's config, from `config.json` and, where it stands, `generation_config.json`.

    Raises:
      ConfigError: a file or field that is missing, malformed, not supported or not understood, by name.
    """
    raw = read_json(folder / "config.json", ConfigError)
    generation_file = folder / "generation_config.json"
    generation = read_json(generation_file, ConfigError) if generation_file.exists() else None
    source = str(folder / "config.json")
    return family(raw.get("model_type"), source).read_config(raw, generation, source)


def load_params(
    folder: Path, config: ModelConfig, dtype: jax.typing.DTypeLike, sharding: jax.sharding.Sharding | None = None
) -> ModelParams:
    """Reads a checkpoint's weights as `dtype`.

    All names, shapes and dtypes are checked from the headers before a tensor is read. Tensors are read one at a time
    into the host array of their leaf, which then becomes the placed array: peak host memory is the arrays, plus the
    tensor at hand. Values are not checked for being finite.

    Args:
      sharding: where each array is placed; the default device where None.

    Raises:
      CheckpointError: a missing or surplus tensor, a wrong shape, a dtype that is not float32, float16 or bfloat16, a
      shard that is missing, corrupt or outside the folder, by name.
    """
    module = family(config.model_type)
    names: dict[str, str | list[str]] = module.tensor_names(config)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))
    shapes = {_path_name(path): leaf.shape for path, leaf in leaves}
    files = _locate(folder)
    _check(folder, files, names, shapes, module.unused_names(config))
    with ExitStack() as stack:
        shards = {file for file, _ in files.values()}
        handles = {file: stack.enter_context(open_tensors(file, CheckpointError)) for file in shards}
        arrays = [
            _place(_read(names[_path_name(path)], leaf, lambda name: handles[files[name][0]]), sharding)
            for path, leaf in leaves
        ]
    return jax.tree_util.tree_unflatten(tree, arrays)


def _path_name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "name", getattr(key, "idx", None))) for key in path)


def _locate(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Tensor -> the shard that holds it, and what the shard's header says of it."""
    if (folder / INDEX).exists():
        raw = read_json(folder / INDEX, CheckpointError).get("weight_map")
        if not isinstance(raw, dict) or not raw or not all(isinstance(shard, str) for shard in raw.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to shard files.")
        shards = sorted(set(raw.values()))
    elif (folder / SINGLE).exists():
        raw, shards = None, [SINGLE]
    else:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        also = f"; {pickled.name} is a pickle, which is never read" if pickled else ""
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{also}.")
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for shard in shards:
        if Path(shard).is_absolute() or len(Path(shard).parts) != 1 or shard in (".", ".."):
            raise CheckpointError(f"{folder / INDEX} names the shard {shard!r}; expected a file of the same folder.")
        for name, info in tensor_infos(folder / shard, CheckpointError).items():
            if name in found:
                raise CheckpointError(f"{name} stands in both {found[name][0].name} and {shard} of {folder}.")
            found[name] = (folder / shard, info)
    if raw is not None:
        for name, shard in raw.items():
            if name not in found or found[name][0].name != shard:
                raise CheckpointError(f"{folder / INDEX} promises {name} in {shard}, which does not hold it.")
    return found


def _check(
    folder: Path,
    files: Mapping[str, tuple[Path, TensorInfo]],
    names: Mapping[str, str | list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    unused: frozenset[str],
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for path, source in names.items():
        if isinstance(source, str):
            expected[source] = shapes[path]
        else:
            expected |= dict.fromkeys(source, shapes[path][1:])
    _refuse(folder, "lacks", [name for name in expected if name not in files])
    _refuse(
        folder,
        "holds tensors that the config has no place for:",
        [n for n in files if n not in expected and n not in unused],
    )
    for name, shape in expected.items():
        file, info = files[name]
        if info.shape != shape:
            raise CheckpointError(f"{name} in {file} has shape {list(info.shape)}; the config expects {list(shape)}.")
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{name} in {file} has dtype {info.dtype}; expected {', '.join(DTYPES)}, not a quantised one."
            )


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckpointError(f"{folder} {what} {', '.join(names[:5])}{more}.")


def _read(source: str | list[str], leaf: jax.ShapeDtypeStruct, handle: Callable[[str], Any]) -> np.ndarray:
    """One leaf in host memory, filled some rows at a time and cast on the way."""
    out = _aligned(leaf.shape, np.dtype(leaf.dtype))
    for index, name in enumerate([source] if isinstance(source, str) else source):
        target = out if isinstance(source, str) else out[index]
        part = handle(name).get_slice(name)
        rows = max(1, CHUNK_BYTES * len(target) // max(target.nbytes, 1))
        for begin in range(0, len(target), rows):
            end = min(begin + rows, len(target))
            target[begin:end] = part[begin:end]
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that a CPU device can take over without a copy, which needs 64-byte alignment."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + size].view(dtype).reshape(shape)


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
