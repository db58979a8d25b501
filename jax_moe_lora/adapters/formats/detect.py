"""One reader for every adapter folder: the layout is decided by the files and keys that are there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jax_moe_lora.adapters.formats.adapter_file import (
    ANOTHER_MODEL,
    OUTSIDE,
    AdapterFile,
    FileLayout,
    Pair,
    Weights,
    pair_keys,
)
from jax_moe_lora.adapters.formats.base_checkpoint import BaseCheckpoint
from jax_moe_lora.adapters.formats.config_fields import B_LAYOUTS
from jax_moe_lora.adapters.formats.config_reading import read_peft_config
from jax_moe_lora.adapters.formats.embedding_copies import check_copies, saved_keys, without_copies
from jax_moe_lora.adapters.formats.look_around import WEIGHTS_INDEX
from jax_moe_lora.adapters.formats.names import BEGIN, TEXT, WRAPPED, AdapterNames, without_prefix
from jax_moe_lora.adapters.formats.outer import read_outer
from jax_moe_lora.adapters.formats.peft import PER_EXPERT, WRAPPERS, read_dense, read_joined
from jax_moe_lora.adapters.formats.peft_config import CONFIG, PeftConfig
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.formats.saved_modules import read_saved_modules
from jax_moe_lora.adapters.formats.targets import check_targets
from jax_moe_lora.adapters.formats.tinker import SGLANG, TINKER
from jax_moe_lora.adapters.formats.trained_tokens import add_trained_tokens, token_rows
from jax_moe_lora.adapters.formats.trtllm import SIDECAR, TRTLLM, share_sides
from jax_moe_lora.adapters.formats.weights import AdapterTensors, open_weights
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from jax_moe_lora.errors import AdapterFormatError, InputError
from jax_moe_lora.files.safetensors_io import unchanged

STACKS = (TINKER, SGLANG, TRTLLM)
LAYOUTS = (WRAPPERS, PER_EXPERT, *STACKS)


def read_adapter(
    folder: str | Path,
    sites: Mapping[str, Site],
    names: AdapterNames,
    name: str | None = None,
    *,
    base: BaseCheckpoint | None = None,
    b_layout: str | None = None,
) -> LoRAAdapter:
    """Reads an adapter in any of the layouts: PEFT's, Tinker's, SGLang's, TensorRT-LLM's.

    Args:
      folder: holds `adapter_config.json`, `adapter_model.safetensors` or shards with an index, and may hold
        `lora_layout.json`.
      sites: the model's projections.
      names: where they stand in adapter files.
      name: of the adapter; the folder's if None.
      base: the base model's checkpoint, with which copies of its embeddings and rows of tokens are compared.
      b_layout: `rank_major` or `grouped_by_expert`, the order of the columns of a 3-D parameter's B. None does as the
        config says, and else as PEFT writes them: `rank_major`.

    Returns:
      The adapter in the file's dtype, and the name of its experts' layout. A shared side stays one matrix; gate and
      up that share an A hold the same array.

    Raises:
      AdapterFormatError: a file that is missing or corrupt; a config field or a key that is not supported, not
        understood, not targeted by the config, ambiguous, or does not fit the model, by name.
      InputError: `b_layout` is invalid.
    """
    folder, problems = Path(folder), Problems()
    check_b_layout(b_layout)
    with open_adapter(folder, problems) as (config, tensors):
        file = AdapterFile(tensors.path, config, sites, names, tensors, problems, b_layout=b_layout)
        check_copies(tensors, config.replaced_modules, base, problems)
        weights = read_weights(file, pair_keys(file.path, without_copies(tensors.infos), problems))
        add_trained_tokens(file, tensors.infos, base, weights)
        replacements = read_saved_modules(file, tensors, base, weights)
    return LoRAAdapter(name or folder.name, weights, config.raw, file.layout, replacements)


def check_b_layout(b_layout: str | None) -> None:
    """Raises an InputError for an order of B's columns that does not exist."""
    if b_layout not in (None, *B_LAYOUTS):
        raise InputError(f"lora_b_layout is {b_layout!r}; expected {' or '.join(B_LAYOUTS)}.")


@contextmanager
def open_adapter(folder: Path, problems: Problems) -> Iterator[tuple[PeftConfig, AdapterTensors]]:
    """An adapter's config and its open tensors. The folder must not change before the block ends.

    Args:
      folder: the adapter's.
      problems: what becomes of a problem.
    """
    with unchanged(AdapterFormatError, *(folder / file for file in (CONFIG, SIDECAR, WEIGHTS_INDEX))):
        config = read_peft_config(folder, problems)
        with open_weights(folder) as tensors:
            yield config, tensors


def adapts_vocabulary(folder: Path) -> bool:
    """Whether an adapter changes the embedding or the head; False where its files cannot be read.

    Args:
      folder: the adapter's.
    """
    problems = Problems(keep=True)
    with problems, open_adapter(folder, problems) as (_, tensors):
        pairs = pair_keys(tensors.path, without_copies(tensors.infos), problems)
        return bool(token_rows(tensors.infos)) or any(pair.layer == OUTSIDE for pair in pairs)
    return False


def whole_matrices(folder: Path) -> int:
    """How many whole matrices an adapter brings in place of embedding and head; 0 where its files cannot be read.

    Args:
      folder: the adapter's.
    """
    problems = Problems(keep=True)
    with problems, open_adapter(folder, problems) as (config, tensors):
        return len(saved_keys(tensors.files, config.replaced_modules))
    return 0


def read_weights(file: AdapterFile, pairs: list[Pair]) -> Weights:
    """The weights of all pairs of a file, by the layout that their keys have.

    Args:
      file: what the readers share.
      pairs: its A and B.
    """
    weights: Weights = {}
    file.prefix = _prefix(file, pairs)
    outer, pairs = [p for p in pairs if p.layer == OUTSIDE], [p for p in pairs if p.layer != OUTSIDE]
    layout, experts = _experts(file, pairs)
    if layout is not None:
        file.layout = layout.name
        with file.problems:
            weights = layout.read(file, experts)
    for pair in pairs:
        if pair.path in file.names.dense or pair.path in file.names.joined:
            with file.problems:
                _add_dense(file, weights, pair)
    read_outer(file, outer, weights)
    check_targets(file, layout, STACKS)
    return share_sides(file, weights)


def _prefix(file: AdapterFile, pairs: list[Pair]) -> str:
    """What the names of the text model's modules begin with in a file; one for all of them."""
    prefixes: dict[str, Pair] = {}
    for pair in pairs:
        name = pair.key.removeprefix(BEGIN)
        prefix = next((prefix for prefix in WRAPPED if without_prefix(name, [prefix]) != name), TEXT)
        if prefix != TEXT or name.startswith(TEXT):
            prefixes.setdefault(prefix, pair)
    for prefix, pair in prefixes.items():
        with file.problems:
            if prefix not in file.names.prefixes:
                expected = " or ".join(file.names.prefixes)
                raise file.error(pair, f"the model's names begin with {expected}, not {prefix}", prefix, expected)
            if prefix != next(iter(prefixes)):
                problem = f"its name begins with {prefix}, and others with {next(iter(prefixes))}"
                raise file.error(pair, problem, prefix, next(iter(prefixes)))
    return next(iter(prefixes), file.names.prefixes[0])


def layout_of(rest: str) -> FileLayout | None:
    """The layout whose keys continue like this after the experts' path; None if there is none."""
    return next((layout for layout in LAYOUTS if layout.rest.fullmatch(rest)), None)


def _experts(file: AdapterFile, pairs: list[Pair]) -> tuple[FileLayout | None, list[Pair]]:
    """The layout of the experts, and their pairs. Two layouts, or two paths, are refused as ambiguous."""
    by_layout: dict[tuple[str, FileLayout], list[Pair]] = {}
    for pair in pairs:
        if pair.path in file.names.dense or pair.path in file.names.joined:
            continue
        experts, rest = file.names.split(pair.path) or ("", "")
        layout = layout_of(rest) if experts else None
        with file.problems:
            if layout is None:
                why = f"the model has no such projection{ANOTHER_MODEL}"
                raise file.error(pair, why, pair.path, "a projection of the model")
            by_layout.setdefault((experts, layout), []).append(pair)
    with file.problems:
        if len(by_layout) > 1:
            (here, layout), (there, other) = list(by_layout)[:2]
            problem = f"it stands as {other.name!r} under {there}, and other keys as {layout.name!r} under {here}"
            raise file.error(by_layout[there, other][0], problem, other.name, layout.name)
    return next(((layout, members) for (_, layout), members in by_layout.items()), (None, []))


def _add_dense(file: AdapterFile, weights: Weights, pair: Pair) -> None:
    modules = file.names.joined.get(pair.path) or (file.dense_module(pair),)
    for module in modules:
        if (pair.layer, module) in weights:
            raise file.duplicate(pair, module)
    if file.two_dimensional(pair):
        found = read_joined(file, pair, modules) if len(modules) > 1 else [read_dense(file, pair)]
        weights.update({(pair.layer, module): one for module, one in zip(modules, found, strict=True)})
