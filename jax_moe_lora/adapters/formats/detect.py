"""One reader for every adapter folder: the layout is decided by the files and keys that are there."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from jax_moe_lora.adapters.formats.adapter_file import (
    ANOTHER_MODEL,
    WEIGHTS,
    AdapterFile,
    FileLayout,
    Pair,
    Weights,
    pair_keys,
)
from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.adapters.formats.peft import PER_EXPERT, WRAPPERS, read_dense
from jax_moe_lora.adapters.formats.peft_config import CONFIG, PeftConfig, read_peft_config
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.formats.tinker import SGLANG, TINKER
from jax_moe_lora.adapters.formats.trtllm import SIDECAR, TRTLLM, share_sides
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.safetensors_io import TensorFile, open_tensors, unchanged

STACKS = (TINKER, SGLANG, TRTLLM)
LAYOUTS = (WRAPPERS, PER_EXPERT, *STACKS)


def read_adapter(
    folder: str | Path, sites: Mapping[str, Site], names: AdapterNames, name: str | None = None
) -> LoRAAdapter:
    """Reads an adapter in any of the layouts: PEFT's, Tinker's, SGLang's, TensorRT-LLM's.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`, and may hold `lora_layout.json`.
      sites, names: the model's projections, and where they stand in adapter files.

    Returns:
      The adapter in the file's dtype, and the name of its experts' layout. A shared side stays one matrix; gate and
      up that share an A hold the same array.

    Raises:
      AdapterFormatError: a file that is missing or corrupt; a config field or a key that is not supported, not
      understood, not targeted by the config, ambiguous, or does not fit the model, by name.
    """
    folder, problems = Path(folder), Problems()
    with open_adapter(folder, problems) as (config, tensors):
        file = AdapterFile(folder / WEIGHTS, config, sites, names, tensors, problems)
        weights = read_weights(file, pair_keys(file.path, tensors.infos, problems))
    return LoRAAdapter(name or folder.name, weights, config.raw, file.layout)


@contextmanager
def open_adapter(folder: Path, problems: Problems) -> Iterator[tuple[PeftConfig, TensorFile]]:
    """An adapter's config and its open tensors; the folder must stay as it is until the block ends."""
    with unchanged(AdapterFormatError, *(folder / file for file in (CONFIG, SIDECAR))):
        config, path = read_peft_config(folder, problems), folder / WEIGHTS
        if not path.exists() and (folder / "adapter_model.bin").exists():
            why = f"{folder} holds adapter_model.bin, a pickle, which is never read; save it as safetensors."
            raise AdapterFormatError(why, file=path, found="adapter_model.bin", expected=WEIGHTS)
        with open_tensors(path, AdapterFormatError) as tensors:
            yield config, tensors


def read_weights(file: AdapterFile, pairs: list[Pair]) -> Weights:
    """What all pairs of a file are to the model, by the layout that their keys have."""
    weights: Weights = {}
    layout, experts = _experts(file, pairs)
    if layout is not None:
        file.layout = layout.name
        with file.problems:
            weights = layout.read(file, experts)
    for pair in pairs:
        if pair.path in file.names.dense:
            with file.problems:
                _add_dense(file, weights, pair)
    _check_targets(file, layout)
    return share_sides(file, weights)


def layout_of(rest: str) -> FileLayout | None:
    """The layout whose keys go on like this behind the experts' path."""
    return next((layout for layout in LAYOUTS if layout.rest.fullmatch(rest)), None)


def _experts(file: AdapterFile, pairs: list[Pair]) -> tuple[FileLayout | None, list[Pair]]:
    """The layout of the experts, and their pairs: one layout under one path, or it would not be known which counts."""
    by_layout: dict[tuple[str, FileLayout], list[Pair]] = {}
    for pair in pairs:
        if pair.path in file.names.dense:
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
    module = file.names.dense[pair.path]
    if (pair.layer, module) in weights:
        raise file.held_twice(pair, module)
    if file.two_dimensional(pair):
        weights[pair.layer, module] = read_dense(file, pair)


def _check_targets(file: AdapterFile, layout: FileLayout | None) -> None:
    """A projection of the model that the config lists and the file has nothing for is an error, not a zero."""
    config, names = file.config, file.names
    own = {path.rpartition(".")[2] for path in names.dense} | set(names.experts)
    if layout in STACKS:
        own |= {part for module in names.experts.values() for part in names.spellings(module)}
    listed = [] if isinstance(config.target_modules, str) else list(config.target_modules)
    # A key that was refused is there all the same, under one of these names.
    present = file.used | file.refused if file.problems.found else file.used
    for target in [t for t in listed if t.rpartition(".")[2] in own] + list(config.target_parameters):
        with file.problems:
            if not any(key == target or key.endswith(f".{target}") for key in present):
                why = f"{config.file} targets {target!r}, and {WEIGHTS} holds no weights for it."
                raise AdapterFormatError(why, file=config.file, key=target, found="no weights", expected="an A and a B")
