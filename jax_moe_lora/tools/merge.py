"""An adapter merged into a copy of its base checkpoint, tensor by tensor."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jax_moe_lora.adapters.formats.config_fields import MAX_RANK
from jax_moe_lora.adapters.lora import LoRAAdapter, memory_of
from jax_moe_lora.adapters.validation.bank_rules import check_adapter
from jax_moe_lora.errors import AdapterFormatError, CheckpointError, ConfigError, InputError
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
from jax_moe_lora.tools.checkpoint_writing import Group, copied, copy_others, write_shards
from jax_moe_lora.tools.requantise import Change, Errors, Requantised, changed_groups


def merge_adapter(
    adapter: LoRAAdapter,
    model: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
    requantise: bool = False,
) -> list[Requantised]:
    """Writes a checkpoint whose weights are the base model's plus the adapter's update: `W + scale * B @ A`.

    One tensor is in memory at a time. Sums are float32's, cast once. Tensors keep their names and forms, and the other
    files of the folder (config, tokenizer, licence) are copied, but for weights in other forms.

    The sum of a quantised weight and an update is not one of the format's numbers. With `requantise` each such weight
    is dequantised, updated and quantised again, with new scales, in the form that it has; weights that the adapter
    leaves alone keep their bits.

    Args:
      adapter: the adapter, in host memory.
      model: folder of the base checkpoint, which is not changed.
      out: the folder to write.
      dtype: of all tensors; each keeps its own where None.
      max_shard_size: of a shard's tensors, such as `"5GB"`, or bytes; a larger tensor has a shard to itself.
      force: replace `out`, if it holds a model.
      requantise: round merged weights to the numbers of a quantised base checkpoint; else one is refused.

    Returns:
      What rounding again changed, a row per module; empty for a base checkpoint in 16 bits.

    Raises:
      AdapterFormatError: the adapter does not fit the model.
      ConfigError: the base checkpoint's config cannot be read.
      CheckpointError: the base checkpoint cannot be read, is quantised (without `requantise`, or in a form that is not
        written: AWQ, GPTQ, nvfp4, zero points), or a merged weight is not finite in its dtype, by name.
      InputError: a bad argument, or `out` exists.
    """
    cast_to = None if dtype is None else check_dtype(dtype)
    limit, model = parse_bytes(max_shard_size), Path(model)
    config = read_model_config(model)
    _check_quantised(config, model, requantise, dtype)
    check_adapter(adapter, adapter_sites(config), MAX_RANK, np.dtype(np.float32))
    with ExitStack() as opened:
        checkpoint = open_checkpoint(model, config, opened)
        updates, changes = _updates(config, adapter, checkpoint, model)
        groups = _groups(
            checkpoint.files, cast_to, updates, changed_groups(changes, checkpoint.files, errors := Errors())
        )
        with whole_folder(out, "config.json", force, model) as folder:
            write_shards(folder, groups, limit)
            copy_others(model, folder, **_dtype_field(model, dtype))
            opened.close()  # refuses a shard that was written to meanwhile, before the folder appears
    return errors.report()


def _check_quantised(config: ModelConfig, model: Path, requantise: bool, dtype: str | None) -> None:
    """Refuses what rounds without being asked to, and being asked to where there is nothing to round to."""
    if config.quantisation is None:
        if requantise:
            raise InputError(f"{model} is in 16 bits, so nothing is quantised again; merge without requantise.")
        return
    if not requantise:
        raise CheckpointError(
            f"{model} is quantised ({config.quantisation.method}): the sum of a weight and an update is not one of its "
            "numbers, so merging needs the 16-bit checkpoint; or round the sums again with requantise (--requantise), "
            "which says what error that makes; or serve the adapter as it is."
        )
    if dtype is not None:
        raise InputError(f"dtype is {dtype!r}, and requantise keeps each tensor's; give one of them.")


def _groups(
    files: Mapping[str, TensorFile],
    cast_to: np.dtype | None,
    updates: "Mapping[str, Sequence[_Update]]",
    changed: Sequence[Group],
) -> list[Group]:
    """All tensors in the order of the files; those of quantised matrices that nothing changes are copied."""
    first = {next(iter(group.planned)): group for group in changed}
    covered = {name for group in changed for name in group.planned}
    groups = []
    for name, file in files.items():
        if name in first:
            groups.append(first[name])
        elif name not in covered:
            plain = file.infos[name].dtype in DTYPES
            groups.append(_group(name, file, cast_to, updates.get(name, [])) if plain else copied(name, file))
    return groups


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


def _updates(
    config: ModelConfig, adapter: LoRAAdapter, checkpoint: Checkpoint, model: Path
) -> tuple[dict[str, list[_Update]], list[Change]]:
    """Checkpoint tensor -> the updates of its matrices; and the changes of quantised matrices."""
    tensors, sites = projection_tensors(config), adapter_sites(config)
    updates: dict[str, list[_Update]] = {}
    changes: list[Change] = []
    changed = {*adapter.modules, *adapter.replacements}
    outer = {module: name for module, name in outer_tensors(config).items() if module in changed}
    if outer and config.tie_embeddings and not _one_for_both(adapter):
        raise AdapterFormatError(
            f"Adapter {adapter.name!r} changes the {' and the '.join(outer)} alone, and this checkpoint has one tensor "
            "for both (tie_word_embeddings): it cannot be merged; untie the checkpoint first."
        )

    def add(name: str, module: str, rows: int, delta: Callable[[], np.ndarray], replaces: bool = False) -> None:
        if name in checkpoint.quantised and replaces:
            raise AdapterFormatError(f"Adapter {adapter.name!r} replaces the {module}, which {model} has quantised.")
        if name in checkpoint.quantised:
            changes.append(Change(name, module, checkpoint.quantised[name], delta))
            return
        part = checkpoint.parts[name]
        updates.setdefault(part.tensor, []).append(_Update(part, rows, delta, replaces))

    for module, matrix in adapter.replacements.items():
        add(outer[module], module, config.vocab_size, partial(matrix.astype, np.float32), replaces=True)
    for key, weights in adapter.weights.items():
        if (name := outer.get(key[1])) is not None:
            # An embedding is stored as [V, D], the transpose of what its adapter says.
            delta = (lambda w=weights: w.delta(0).T) if key[1] == "embedding" else partial(weights.delta, 0)
            add(name, key[1], config.vocab_size, delta)
            continue
        for expert in map(int, np.flatnonzero(weights.ranks)):
            add(tensors[key][expert], key[1], sites[key[1]].out_width, partial(weights.delta, expert))
    return updates, changes


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
