"""An adapter merged into a copy of its base checkpoint, tensor by tensor."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jax_moe_lora.adapters.formats.config_fields import MAX_RANK
from jax_moe_lora.adapters.lora import LoRAAdapter, memory_of
from jax_moe_lora.adapters.validation.bank_rules import check_adapter
from jax_moe_lora.errors import AdapterFormatError, CheckpointError, ConfigError
from jax_moe_lora.files.dtypes import DTYPES, check_dtype
from jax_moe_lora.files.folders import whole_folder
from jax_moe_lora.files.safetensors_io import TensorFile, read_json
from jax_moe_lora.files.safetensors_writer import Planned
from jax_moe_lora.files.sizes import parse_bytes
from jax_moe_lora.models.checkpoint_tensors import Part
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.loading import Checkpoint, open_checkpoint
from jax_moe_lora.models.names import outer_tensors, projection_tensors
from jax_moe_lora.models.sites import adapter_sites
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.tools.checkpoint_writing import Group, copy_others, write_shards


def merge_adapter(
    adapter: LoRAAdapter,
    model: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> None:
    """Writes a checkpoint whose weights are the base model's plus the adapter's update: `W + scale * B @ A`.

    One tensor is in memory at a time. Sums are float32's, cast once. Tensors keep their names and forms, and the other
    files of the folder (config, tokenizer, licence) are copied, but for weights in other forms.

    Args:
      adapter: the adapter, in host memory.
      model: folder of the base checkpoint, which is not changed.
      out: the folder to write.
      dtype: of all tensors; each keeps its own where None.
      max_shard_size: of a shard's tensors, such as `"5GB"`, or bytes; a larger tensor has a shard to itself.
      force: replace `out`, if it holds a model.

    Raises:
      AdapterFormatError: the adapter does not fit the model.
      ConfigError: the base checkpoint's config cannot be read.
      CheckpointError: the base checkpoint cannot be read, or a merged weight is not finite in its dtype, by name.
      InputError: a bad argument, or `out` exists.
    """
    cast_to = None if dtype is None else check_dtype(dtype)
    limit, model = parse_bytes(max_shard_size), Path(model)
    config = read_model_config(model)
    if config.quantisation is not None:
        raise CheckpointError(
            f"{model} is quantised ({config.quantisation.method}): the sum of a weight and an update is not one of its "
            "numbers, so merging needs the 16-bit checkpoint; or serve the adapter as it is."
        )
    check_adapter(adapter, adapter_sites(config), MAX_RANK, np.dtype(np.float32))
    with ExitStack() as opened:
        checkpoint = open_checkpoint(model, config, opened)
        files, updates = checkpoint.files, _updates(config, adapter, checkpoint)
        groups = [_group(name, file, cast_to, updates.get(name, [])) for name, file in files.items()]
        with whole_folder(out, "config.json", force) as folder:
            write_shards(folder, groups, limit)
            copy_others(model, folder, **_dtype_field(model, dtype))
            opened.close()  # refuses a shard that was written to meanwhile, before the folder appears


def _dtype_field(model: Path, dtype: str | None) -> dict[str, str]:
    """The field of the config by which transformers loads the merged weights."""
    if dtype is None:
        return {}
    return {"torch_dtype" if "torch_dtype" in read_json(model / "config.json", ConfigError) else "dtype": dtype}


@dataclass(frozen=True)
class _Update:
    """One matrix of a tensor, and what the adapter adds to it.

    Attributes:
      part: where the matrix stands in the tensor.
      rows: of the matrix.
      delta: makes the update, float32 `[rows, in]`.
      replaces: the update is a matrix in place of the tensor's.
    """

    part: Part
    rows: int
    delta: Callable[[], np.ndarray]
    replaces: bool = False


def _updates(config: ModelConfig, adapter: LoRAAdapter, checkpoint: Checkpoint) -> dict[str, list[_Update]]:
    """Checkpoint tensor -> the updates of its matrices."""
    tensors, sites = projection_tensors(config), adapter_sites(config)
    updates: dict[str, list[_Update]] = {}
    changed = {*adapter.modules, *adapter.replacements}
    outer = {module: name for module, name in outer_tensors(config).items() if module in changed}
    if outer and config.tie_embeddings and not _one_for_both(adapter):
        raise AdapterFormatError(
            f"Adapter {adapter.name!r} changes the {' and the '.join(outer)} alone, and this checkpoint has one tensor "
            "for both (tie_word_embeddings): it cannot be merged; untie the checkpoint first."
        )
    for module, matrix in adapter.replacements.items():
        part = checkpoint.parts[outer[module]]
        updates[part.tensor] = [_Update(part, config.vocab_size, partial(matrix.astype, np.float32), replaces=True)]
    for key, weights in adapter.weights.items():
        if (name := outer.get(key[1])) is not None:
            # An embedding is stored as [V, D], the transpose of what its adapter says.
            delta = (lambda w=weights: w.delta(0).T) if key[1] == "embedding" else partial(weights.delta, 0)
            part = checkpoint.parts[name]
            updates.setdefault(part.tensor, []).append(_Update(part, config.vocab_size, delta))
            continue
        for expert in map(int, np.flatnonzero(weights.ranks)):
            part = checkpoint.parts[tensors[key][expert]]
            update = _Update(part, sites[key[1]].out_width, partial(weights.delta, expert))
            updates.setdefault(part.tensor, []).append(update)
    return updates


def _one_for_both(adapter: LoRAAdapter) -> bool:
    """Whether one matrix replaces both embedding and head, as tied weights have it."""
    return len(adapter.replacements) == 2 and len({*map(memory_of, adapter.replacements.values())}) == 1


def _group(name: str, file: TensorFile, cast_to: np.dtype | None, updates: "Sequence[_Update]") -> Group:
    planned = Planned(cast_to or DTYPES[file.infos[name].dtype], file.infos[name].shape)
    return Group({name: planned}, lambda: [(name, _merged(name, file, planned.dtype, updates))])


def _merged(name: str, file: TensorFile, dtype: np.dtype, updates: Sequence[_Update]) -> np.ndarray:
    """A tensor of the base checkpoint, updated and cast."""
    base = file.get_tensor(name)
    with np.errstate(over="ignore"):
        merged = base.astype(dtype, copy=False)
        for update in updates:
            # `base` and `merged` may be one array: a matrix is read before it is written.
            before = 0 if update.replaces else update.part.view(base, update.rows).astype(np.float32)
            matrix = before + update.delta()
            update.part.view(merged, update.rows)[...] = matrix.astype(dtype)
    if not np.isfinite(merged).all():
        raise CheckpointError(f"{name} of {file.path.parent} with the adapter is not finite in {merged.dtype}.")
    return merged
