"""A 16-bit checkpoint, written again in a published quantised form."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.dtypes import DTYPES
from jax_moe_lora.files.folders import whole_folder
from jax_moe_lora.files.safetensors_io import TensorFile
from jax_moe_lora.files.safetensors_writer import Planned
from jax_moe_lora.files.sizes import parse_bytes
from jax_moe_lora.models.checkpoint_tensors import Part
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import PIECE_BYTES, Checkpoint, open_checkpoint
from jax_moe_lora.models.names import plain_name, table, tensor_names
from jax_moe_lora.models.quantised.forms import FileTensor, Form, Matrix
from jax_moe_lora.models.quantised.quantising import empty, quantise_part
from jax_moe_lora.models.quantised.schemes import GPT_OSS, quantised_formats
from jax_moe_lora.models.quantised.writing import file_array, planned_tensors, written_form, written_settings
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.tools.checkpoint_writing import Group, copied, copy_others, write_shards
from pallas_kernels.quantised.array import Quantised
from pallas_kernels.quantised.format import Format


def quantise_checkpoint(
    model: str | Path,
    out: str | Path,
    format: str,
    *,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> None:
    """Writes a quantised copy of a 16-bit checkpoint, in a published form.

    `Model.from_pretrained(out)` has the arrays of `Model.from_pretrained(model, quantise=format)`, bit for bit. One
    tensor of the checkpoint is in memory at a time. Experts that stand in stacks get a tensor each, but for gpt-oss.
    The other files of the folder (config, tokenizer, licence) are copied, but for weights in other forms.

    Args:
      model: folder of the checkpoint, which is not changed.
      out: the folder to write.
      format: `fp8` (as DeepSeek publishes), `mxfp4` (as gpt-oss; other models as compressed-tensors), `int4` or
        `int4_g128` (compressed-tensors).
      max_shard_size: of a shard's tensors, such as `"5GB"`, or bytes; a larger tensor has a shard to itself.
      force: replace `out`, if it holds a model.

    Raises:
      ConfigError: the checkpoint's config cannot be read.
      CheckpointError: the checkpoint cannot be read, is quantised already, or has a form that the format has not.
      InputError: a bad argument, a width that the format does not divide, or `out` exists or is the checkpoint.
    """
    limit, model = parse_bytes(max_shard_size), Path(model)
    config = read_model_config(model)
    formats = quantised_formats(config, format, model)
    form = written_form(format, config.model_type)
    if config.model_type == GPT_OSS and not form.stacked:
        raise CheckpointError(f"{model} is of gpt_oss, for which no form of {format} is published; write mxfp4.")
    with ExitStack() as opened:
        checkpoint = open_checkpoint(model, config, opened)
        members = _members(config, checkpoint, formats)
        groups = [
            _group(form, config, checkpoint.files[name], members[name]) if name in members else copied(name, file)
            for name, file in checkpoint.files.items()
        ]
        settings = written_settings(format, config.model_type, _kept(checkpoint.files, members))
        with whole_folder(out, "config.json", force, model) as folder:
            write_shards(folder, groups, limit)
            copy_others(model, folder, quantization_config=settings)
            opened.close()  # refuses a shard that was written to meanwhile, before the folder appears


@dataclass(frozen=True)
class _Member:
    """One matrix of a checkpoint's tensor, and what it becomes.

    Attributes:
      name: its own, in a checkpoint of the text model alone.
      part: where it stands.
      matrix: its sizes and format.
    """

    name: str
    part: Part
    matrix: Matrix


def _members(config: ModelConfig, checkpoint: Checkpoint, formats: Mapping[str, Format]) -> dict[str, list[_Member]]:
    """Checkpoint tensor -> the matrices of it that are quantised."""
    sources = tensor_names(config)
    rows = {f"layers.{index}.{row.name}": row for index in range(config.num_layers) for row in table(config, index)}
    members: dict[str, list[_Member]] = {}
    for path, format in formats.items():
        source, (height, width) = sources[path], rows[path].shape[-2:]
        for name in [source] if isinstance(source, str) else source:
            part = checkpoint.parts[name]
            members.setdefault(part.tensor, []).append(_Member(name, part, Matrix(height, width, format)))
    return members


def _kept(files: Mapping[str, TensorFile], members: Mapping[str, Sequence[_Member]]) -> list[str]:
    """The modules whose matrices stay as they are; the head too where it is the embedding."""
    names = [name for name in files if name not in members and name.endswith(".weight")]
    matrices = [name.removesuffix(".weight") for name in names if len(files[name].infos[name].shape) > 1]
    return [*dict.fromkeys((*matrices, "lm_head"))]


def _group(form: Form, config: ModelConfig, file: TensorFile, members: Sequence[_Member]) -> Group:
    """What a tensor of the checkpoint becomes."""
    if form.stacked:
        return _stack(form, file, members)
    kind = DTYPES[file.infos[members[0].part.tensor].dtype]
    tensors: dict[str, dict[FileTensor, tuple[str, Planned]]] = {}
    for member in members:
        stem = _own_name(config, member, file).removesuffix("weight")
        planned = planned_tensors(form, member.matrix, kind)
        tensors[member.name] = {tensor: (stem + tensor.suffix, plan) for tensor, plan in planned.items()}

    def make() -> Iterator[tuple[str, np.ndarray]]:
        for member in members:
            weight = _quantised(member, file, kind)
            for tensor, (name, plan) in tensors[member.name].items():
                yield name, file_array(tensor, plan, weight)

    return Group({name: plan for matrix in tensors.values() for name, plan in matrix.values()}, make)


def _stack(form: Form, file: TensorFile, members: Sequence[_Member]) -> Group:
    """The matrices of all experts in one tensor, and their scales in another, as gpt-oss has them."""
    tensor, matrix = members[0].part.tensor, members[0].matrix
    if members[0].part.expert is None:
        why = "and the form that gpt-oss is published in has all of them in a stack"
        raise CheckpointError(f"{tensor} in {file.path} holds one expert, {why}.")
    experts = 1 + max(member.part.expert or 0 for member in members)
    rows, columns = len(members) // experts * matrix.rows, matrix.columns
    width = matrix.format.block[1]
    shapes = {"values": (experts, rows, columns // width, width // 2), "scales": (experts, rows, columns // width)}
    planned = {f"{tensor}{part.suffix}": Planned(np.dtype(np.uint8), shapes[part.part]) for part in form.tensors}

    def make() -> Iterator[tuple[str, np.ndarray]]:
        whole = empty((experts, rows, columns), matrix.format, np.dtype(np.uint8))
        for member in members:
            weight, part = _quantised(member, file, np.dtype(np.uint8)), member.part
            place = slice(part.first_row, part.first_row + matrix.rows * part.step, part.step)
            whole.values[part.expert, place] = weight.values
            whole.scales[part.expert, place] = weight.scales
        for one in form.tensors:
            name = f"{tensor}{one.suffix}"
            yield name, np.asarray(getattr(whole, one.part)).reshape(planned[name].shape)

    return Group(planned, make)


def _quantised(member: _Member, file: TensorFile, scales_dtype: np.dtype) -> Quantised:
    weight = empty((member.matrix.rows, member.matrix.columns), member.matrix.format, scales_dtype)
    quantise_part(weight, member.part, file, np.dtype(np.float32), PIECE_BYTES)
    return weight


def _own_name(config: ModelConfig, member: _Member, file: TensorFile) -> str:
    """The name of a matrix's own tensor, with whatever a multimodal checkpoint has before it."""
    tensor = member.part.tensor
    if member.part.expert is None and tensor.endswith(".weight") and file.infos[tensor].shape[0] == member.matrix.rows:
        return tensor
    name = tensor[: tensor.index("layers.")] + member.name[member.name.index("layers.") :]
    if plain_name(config, name) != member.name:
        raise CheckpointError(f"{tensor} in {file.path} holds {member.name}; save it as a tensor of its own first.")
    return name
