"""Checkpoint weights: sharded safetensors, read tensor by tensor into placed arrays."""

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_moe_lora.config import ModelConfig
from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.dtypes import DTYPES
from jax_moe_lora.files.safetensors_io import TensorFile, open_tensors, read_json
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.names import tensor_names, unused_names
from jax_moe_lora.models.params import ModelParams, abstract_params

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Read, cast and checked at a time.
PIECE_BYTES = 8 * 2**20
ALIGNMENT = 64


def load_params(
    folder: Path, config: ModelConfig, dtype: jax.typing.DTypeLike, sharding: jax.sharding.Sharding | None = None
) -> ModelParams:
    """Reads a checkpoint's weights as `dtype`.

    All names, shapes and dtypes are checked from the headers before a tensor is read. Tensors are read one at a time
    into the host array of their leaf, which on a CPU becomes the placed array without a copy: peak host memory is the
    arrays, plus a few times `PIECE_BYTES`. Each shard is opened once.

    Args:
      sharding: where each array is placed; the default device where None.

    Raises:
      CheckpointError: a missing or surplus tensor, a wrong shape, a dtype that is not float32, float16 or bfloat16,
      values that are not finite (also after the cast), a shard that is missing, corrupt, outside the folder or written
      to meanwhile, by name.
    """
    names = tensor_names(config, family(config.model_type).ADAPTER_NAMES)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))
    with ExitStack() as opened:
        files = checked_files(folder, config, opened)
        arrays = [_place(_read(names[_path_name(path)], leaf, files), sharding) for path, leaf in leaves]
    return jax.tree_util.tree_unflatten(tree, arrays)


def checked_files(folder: Path, config: ModelConfig, opened: ExitStack) -> dict[str, TensorFile]:
    """Tensor -> the shard that holds it, which is open as long as `opened` is; the shards in order.

    Raises:
      CheckpointError: what `load_params` finds wrong in headers.
    """
    names = tensor_names(config, family(config.model_type).ADAPTER_NAMES)
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_params(config, np.float32))
    files = _locate(folder, opened)
    _check(folder, files, names, {_path_name(path): leaf.shape for path, leaf in leaves}, unused_names(config))
    return files


def _path_name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "name", getattr(key, "idx", None))) for key in path)


def _locate(folder: Path, opened: ExitStack) -> dict[str, TensorFile]:
    """Tensor -> the shard that holds it, which is open as long as `opened` is."""
    if os.path.lexists(folder / INDEX):
        raw = read_json(folder / INDEX, CheckpointError).get("weight_map")
        if not isinstance(raw, dict) or not raw or not all(isinstance(shard, str) for shard in raw.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to shard files.")
        shards = sorted(set(raw.values()))
    elif os.path.lexists(folder / SINGLE):
        raw, shards = None, [SINGLE]
    else:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        also = f"; {pickled.name} is a pickle, which is never read" if pickled else ""
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{also}.")
    file_of: dict[str, TensorFile] = {}
    for shard in shards:
        if Path(shard).is_absolute() or len(Path(shard).parts) != 1 or shard in (".", ".."):
            raise CheckpointError(f"{folder / INDEX} names the shard {shard!r}; expected a file of the same folder.")
        file = opened.enter_context(open_tensors(folder / shard, CheckpointError))
        for name in file.infos:
            if name in file_of:
                raise CheckpointError(f"{name} stands in both {file_of[name].path.name} and {shard} of {folder}.")
            file_of[name] = file
    if raw is not None:
        for name, shard in raw.items():
            if name not in file_of or file_of[name].path.name != shard:
                raise CheckpointError(f"{folder / INDEX} promises {name} in {shard}, which does not hold it.")
    return file_of


def _check(
    folder: Path,
    files: Mapping[str, TensorFile],
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
        info, file = files[name].infos[name], files[name].path
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


def _read(source: str | list[str], leaf: jax.ShapeDtypeStruct, files: Mapping[str, TensorFile]) -> np.ndarray:
    """One leaf in host memory, filled some rows at a time and cast on the way."""
    out = _aligned(leaf.shape, np.dtype(leaf.dtype))
    targets = {source: out} if isinstance(source, str) else {name: out[index] for index, name in enumerate(source)}
    for name, target in targets.items():
        file = files[name]
        row_bytes = file.infos[name].nbytes // len(target)
        step = max(1, PIECE_BYTES // row_bytes)
        for begin in range(0, len(target), step):
            rows = target[begin : begin + step]
            with np.errstate(over="ignore", invalid="ignore"):
                rows[...] = file.get_rows(name, begin, begin + len(rows))
            if not np.isfinite(rows).all():
                raise CheckpointError(
                    f"{name} in {file.path} holds values that are not finite in {out.dtype}, which are never served."
                )
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that a CPU device can take over without a copy, which needs 64-byte alignment."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + size].view(dtype).reshape(shape)


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)  # jnp.asarray would copy
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
