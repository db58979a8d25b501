"""Checkpoint weights: sharded safetensors, read tensor by tensor into placed arrays."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.dtypes import DTYPES
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.models.checkpoint_files import locate
from jax_moe_lora.models.checkpoint_tensors import Part, joined_of, stacked_parts, stacks_of
from jax_moe_lora.models.names import other_names, plain_name, tensor_names, unused_tensors
from jax_moe_lora.models.params import ModelParams, abstract_params, leaf_name
from jax_moe_lora.models.parts import Box, load_parts, whole_box
from jax_moe_lora.models.quantised.locating import activation_scales, check_experts, quantised_matrices
from jax_moe_lora.models.quantised.quantising import read_as_quantised
from jax_moe_lora.models.quantised.reading import read_quantised
from jax_moe_lora.models.quantised.stored import StoredMatrix
from jax_moe_lora.models.specs.model import ModelConfig
from pallas_kernels.quantised.api import dequantise
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.format import Format
from pallas_kernels.quantised.split import split_specs

# Read, cast and checked at a time.
PIECE_BYTES = 8 * 2**20
ALIGNMENT = 64
Placement = jax.sharding.Sharding | ModelParams | None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's open files, whose headers are what the config expects.

    Attributes:
      files: tensor -> the file that holds it; the files in order.
      parts: a matrix or vector of the model, by its name in the per-expert form -> where it stands.
      unused: tensors that are not read -> what they are, such as those of a vision tower.
      quantised: a matrix of the model that is stored in few bits, by the same name -> where it stands.
    """

    files: Mapping[str, TensorFile]
    parts: Mapping[str, Part]
    unused: Mapping[str, str]
    quantised: Mapping[str, StoredMatrix]


def load_params(
    folder: Path,
    config: ModelConfig,
    dtype: jax.typing.DTypeLike,
    sharding: Placement = None,
    quantise: Mapping[str, Format] = MappingProxyType({}),
) -> ModelParams:
    """Reads a checkpoint's weights as `dtype`, those that are quantised as `Quantised`.

    All names, shapes and dtypes are checked from the headers before a tensor is read. Matrices are read one at a time
    into the host array of their leaf, which on a CPU becomes the placed array without a copy: peak host memory is the
    arrays, plus a few times `PIECE_BYTES`, also where one tensor stacks all experts. Each shard is opened once. Of an
    array that is split over devices only the parts of this process's devices are read (`parts.py`).

    Args:
      folder: holds the safetensors files.
      config: the model.
      dtype: of the arrays.
      sharding: where arrays are placed: one `Sharding` for all, or a tree of them; the default device where None.
      quantise: leaves of a 16-bit checkpoint that are quantised while they are read: path -> format
        (`quantised.schemes.quantised_formats`).

    Raises:
      CheckpointError: a missing or surplus tensor, a wrong shape, a dtype that is not float32, float16 or bfloat16,
        values that are not finite (also after the cast), a shard that is missing, corrupt, outside the folder or
        written to meanwhile, by name.
    """
    names = tensor_names(config)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))
    with ExitStack() as opened:
        checkpoint = open_checkpoint(folder, config, opened)
        places = jax.tree.leaves(sharding) if isinstance(sharding, ModelParams) else [sharding] * len(leaves)
        arrays = [
            _load(names[_path_name(path)], leaf, checkpoint, np.dtype(dtype), place, quantise.get(_path_name(path)))
            for (path, leaf), place in zip(leaves, places, strict=True)
        ]
    return jax.tree_util.tree_unflatten(tree, arrays)


def stored_formats(folder: Path, config: ModelConfig) -> dict[str, Format]:
    """The format of each matrix that a checkpoint holds quantised, from its headers: `layers.0.gate` -> format.

    Args:
      folder: holds the safetensors files.
      config: the model.

    Raises:
      CheckpointError: what `load_params` finds wrong in headers.
    """
    with ExitStack() as opened:
        quantised = open_checkpoint(folder, config, opened).quantised
    firsts = {path: source if isinstance(source, str) else source[0] for path, source in tensor_names(config).items()}
    return {path: quantised[first].matrix.format for path, first in firsts.items() if first in quantised}


def open_checkpoint(folder: Path, config: ModelConfig, opened: ExitStack) -> Checkpoint:
    """Opens a checkpoint's files and finds the model's weights in them.

    Args:
      folder: holds the safetensors files.
      config: the model.
      opened: the files are open as long as it is.

    Raises:
      CheckpointError: what `load_params` finds wrong in headers.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_params(config, np.float32))
    shapes = {_path_name(path): leaf.shape for path, leaf in leaves}
    expected: dict[str, tuple[int, ...]] = {}
    for path, source in tensor_names(config).items():
        expected |= {source: shapes[path]} if isinstance(source, str) else dict.fromkeys(source, shapes[path][1:])
    files = locate(folder, opened)
    unused = unused_tensors(config, files)
    written = {plain_name(config, name): name for name in files if name not in unused}
    stacked = stacked_parts([*stacks_of(config, written), *joined_of(config, written)], files)
    aliases = other_names(config)
    quantised = quantised_matrices(config, written, files, expected, aliases)
    if config.quantisation is not None:
        unused |= activation_scales(files)

    def part(name: str) -> Part:
        plain = name if name in written else aliases.get(name, name)
        return Part(written.get(plain, plain))

    plain = {name: shape for name, shape in expected.items() if name not in quantised}
    parts = {name: stacked.get(name) or part(name) for name in plain}
    tensors = dict.fromkeys(part.tensor for one in quantised.values() for _, part in one.parts)
    _check(folder, files, plain, parts, stacked, [*unused, *tensors])
    for source in tensor_names(config).values():
        check_experts([source] if isinstance(source, str) else source, quantised, parts, files)
    return Checkpoint(files, parts, unused, quantised)


def _path_name(path: tuple[Any, ...]) -> str:
    return ".".join(map(leaf_name, path))


def _check(
    folder: Path,
    files: Mapping[str, TensorFile],
    expected: Mapping[str, tuple[int, ...]],
    parts: Mapping[str, Part],
    stacked: Mapping[str, Part],
    others: Sequence[str],
) -> None:
    _refuse(folder, "lacks", [name for name in expected if parts[name].tensor not in files])
    used = {*others, *(part.tensor for part in parts.values())}
    _refuse(
        folder,
        "holds tensors that the config has no place for:",
        [name for name in files if name not in used],
    )
    for name, shape in expected.items():
        tensor = parts[name].tensor
        info, file = files[tensor].infos[tensor], files[tensor].path
        if name not in stacked and info.shape != shape:
            raise CheckpointError(f"{tensor} in {file} has shape {list(info.shape)}; the config expects {list(shape)}.")
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor} in {file} has dtype {info.dtype}; expected {', '.join(DTYPES)}, or scales beside it, and "
                "a quantization_config that says which."
            )


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckpointError(f"{folder} {what} {', '.join(names[:5])}{more}.")


def _load(
    source: str | list[str],
    leaf: jax.ShapeDtypeStruct,
    checkpoint: Checkpoint,
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
    format: Format | None = None,
) -> jax.Array | Quantised:
    """One leaf on its device: an array, or a quantised weight where the checkpoint has one."""
    names = [source] if isinstance(source, str) else source
    stored = [checkpoint.quantised[name] for name in names if name in checkpoint.quantised]
    if format is not None:
        parts = [checkpoint.parts[name] for name in names]
        few = read_as_quantised(parts, leaf.shape, format, checkpoint.files, dtype, _aligned, PIECE_BYTES)
        return _place_quantised(few, sharding)
    if not stored:
        if sharding is None:
            return jax.device_put(_read(source, leaf, checkpoint))  # jnp.asarray would copy
        return load_parts(leaf.shape, sharding, partial(_read, source, leaf, checkpoint))
    host = read_quantised(stored, checkpoint.files, dtype, isinstance(source, list), _aligned, PIECE_BYTES)
    weight = _place_quantised(host, sharding)
    # Small ones that stay float32 in a model of 16 bits, such as routers: rows in 16 bits would round them.
    return weight if leaf.dtype == dtype else dequantise(weight, leaf.dtype)


def _read(
    source: str | list[str], leaf: jax.ShapeDtypeStruct, checkpoint: Checkpoint, box: Box | None = None
) -> np.ndarray:
    """One leaf, or a box of it, in host memory: filled some rows at a time and cast on the way."""
    box = whole_box(leaf.shape) if box is None else box
    out = _aligned(tuple(end - begin for begin, end in box), np.dtype(leaf.dtype))
    if isinstance(source, str):
        targets = {source: out}
    else:
        (first, last), *box = box
        targets = {name: out[index] for index, name in enumerate(source[first:last])}
    row, column = box[0][0], box[-1][0] if len(box) > 1 else 0
    for name, target in targets.items():
        part = checkpoint.parts[name]
        file = checkpoint.files[part.tensor]
        for rows, values in part.at(row, column).pieces(file, target, PIECE_BYTES):
            with np.errstate(over="ignore", invalid="ignore"):
                rows[...] = values
            if not np.isfinite(rows).all():
                raise CheckpointError(
                    f"{part.tensor} in {file.path} holds values that are not finite in {out.dtype}, which are never "
                    "served."
                )
    return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that a CPU device can take over without a copy, which needs 64-byte alignment."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT
    return raw[skip : skip + size].view(dtype).reshape(shape)


def _place_quantised(host: Quantised, sharding: jax.sharding.Sharding | None) -> Quantised:
    if not isinstance(sharding, NamedSharding):
        return jax.tree.map(lambda array: _place(array, sharding), host)
    specs = split_specs(host, sharding.spec)
    return jax.tree.map(lambda array, spec: _place(array, NamedSharding(sharding.mesh, spec)), host, specs)


def _place(array: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(array)  # jnp.asarray would copy
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
