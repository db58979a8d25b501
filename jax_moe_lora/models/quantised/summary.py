"""What a quantised checkpoint holds, from its headers, and whether its scales are numbers; without jax."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.models.checkpoint_files import locate
from jax_moe_lora.models.checkpoint_tensors import Part
from jax_moe_lora.models.names import other_names, parameter_tensors, plain_name, table, unused_tensors
from jax_moe_lora.models.quantised.locating import check_experts, quantised_matrices
from jax_moe_lora.models.quantised.stored import StoredMatrix
from jax_moe_lora.models.quantised.values import finite, too_large
from jax_moe_lora.models.specs.model import ModelConfig

BITS = {"fp8": 8}
"""Bits of a codec's values, where they are not 4."""


@dataclass(frozen=True)
class FormatSummary:
    """The matrices of a checkpoint that have one format.

    Attributes:
      name: of the format.
      bits: of a value, without its share of a scale.
      block: rows and columns that share a scale; 0 for all of them.
      matrices: how many; each expert's count.
      parameters: their values.
      nbytes: of their tensors, scales included.
    """

    name: str
    bits: int
    block: tuple[int, int]
    matrices: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class _Found:
    files: Mapping[str, TensorFile]
    matrices: Mapping[str, StoredMatrix]


def summarise_formats(folder: Path, config: ModelConfig) -> tuple[list[FormatSummary], int]:
    """The formats of a checkpoint, the one with most bytes first.

    Args:
      folder: holds the safetensors files.
      config: the model.

    Returns:
      A summary per format, and the values of all other tensors. Nothing and 0 for a checkpoint that is not quantised.

    Raises:
      CheckpointError: tensors that are missing, or do not belong together, by name.
    """
    if config.quantisation is None:
        return [], 0
    with ExitStack() as opened:
        found = _find(folder, config, opened)
        by_format: dict[object, list[StoredMatrix]] = {}
        for stored in found.matrices.values():
            by_format.setdefault(stored.matrix.format, []).append(stored)
        rows, quantised = [], set()
        for members in by_format.values():
            names = {part.tensor for stored in members for _, part in stored.parts}
            format, sizes = members[0].matrix.format, [one.matrix.rows * one.matrix.columns for one in members]
            nbytes = sum(found.files[name].infos[name].nbytes for name in names)
            bits = BITS.get(format.codec, 4)
            rows.append(FormatSummary(format.name, bits, format.block, len(members), sum(sizes), nbytes))
            quantised |= names
        others = [file.infos[name].shape for name, file in found.files.items() if name not in quantised]
    return sorted(rows, key=lambda row: -row.nbytes), sum(int(np.prod(shape, dtype=np.int64)) for shape in others)


def scale_problems(folder: Path, config: ModelConfig, dtype: np.dtype) -> Iterator[CheckpointError]:
    """What is wrong with the scales of a quantised checkpoint; values are not read.

    Args:
      folder: holds the safetensors files.
      config: the model.
      dtype: in which all numbers must be finite.

    Yields:
      An error per tensor of scales, or the first one in the headers.
    """
    if config.quantisation is None:
        return
    with ExitStack() as opened:
        try:
            found = _find(folder, config, opened)
        except CheckpointError as error:
            yield error
            return
        seen: set[str] = set()
        for stored in found.matrices.values():
            for tensor, part in stored.parts:
                name, file = part.tensor, found.files[part.tensor]
                if tensor.part not in ("scales", "global_scale") or name in seen:
                    continue
                seen.add(name)
                codec = stored.matrix.format.codec if tensor.part == "scales" else ""
                if problem := _problem(file, name, codec, dtype):
                    yield CheckpointError(f"{name} in {file.path} {problem}.", file=file.path, key=name)


def _problem(file: TensorFile, name: str, codec: str, dtype: np.dtype) -> str:
    """What is wrong with a tensor of scales of a codec, or with global ones where it is empty."""
    info = file.infos[name]
    values = file.get_stored(name, 0, info.shape)
    if not finite(values, info.dtype, bool(codec)):
        return "holds scales that are not finite"
    scale = too_large(codec, {"scales": values}, dtype) if codec not in ("", "nvfp4") else None
    return "" if scale is None else f"has a scale of {scale:.3g}, with which values are not finite in {dtype}"


def _find(folder: Path, config: ModelConfig, opened: ExitStack) -> _Found:
    files = locate(folder, opened)
    unused = unused_tensors(config, files)
    written = {plain_name(config, name): name for name in files if name not in unused}
    expected: dict[str, tuple[int, ...]] = {}
    experts: list[list[str]] = []
    if not config.tie_embeddings:
        expected["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        for row in table(config, layer):
            names = parameter_tensors(config, layer, row)
            if isinstance(names, str):
                expected[names] = row.shape
            else:
                expected |= dict.fromkeys(names, row.shape[1:])
                experts.append(names)
    quantised = quantised_matrices(config, written, files, expected, other_names(config))
    for names in experts:
        plain = {name: Part(written[name]) for name in names if name in written and name not in quantised}
        check_experts(names, quantised, plain, files)
    return _Found(files, quantised)
