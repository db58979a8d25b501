"""One writer for every layout: parts, config and sidecar, as a folder that appears whole or not at all."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jax_moe_lora.adapters.formats.adapter_file import FileLayout
from jax_moe_lora.adapters.formats.config_fields import MAX_RANK
from jax_moe_lora.adapters.formats.look_around import WEIGHTS
from jax_moe_lora.adapters.formats.names import AdapterNames, with_prefix
from jax_moe_lora.adapters.formats.peft import PER_EXPERT, WRAPPERS
from jax_moe_lora.adapters.formats.peft_config import CONFIG
from jax_moe_lora.adapters.formats.tinker import TINKER
from jax_moe_lora.adapters.formats.trtllm import SIDECAR, TRTLLM
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from jax_moe_lora.adapters.validation.bank_rules import check_adapter
from jax_moe_lora.adapters.writing import peft, stacks
from jax_moe_lora.adapters.writing.config import Says, settle
from jax_moe_lora.adapters.writing.draft import Draft, Part, full_name
from jax_moe_lora.arguments import flag
from jax_moe_lora.errors import AdapterFormatError, InputError
from jax_moe_lora.files.dtypes import DTYPES
from jax_moe_lora.files.folders import whole_folder
from jax_moe_lora.files.safetensors_writer import Planned, write_tensors

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Plan:
    """A folder that is yet to be written.

    Attributes:
      tensors: by their keys.
      config: `adapter_config.json`.
      sidecar: `lora_layout.json`; None if there is none.
      notes: what `write_adapter` returns.
    """

    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, object]
    sidecar: Mapping[str, object] | None
    notes: list[str]


@dataclass(frozen=True)
class WrittenLayout:
    """A layout that is written.

    Attributes:
      read_as: the same layout for reading.
      parts: makes what a file holds.
      targets: what a config calls a module (see `peft.py`).
      says: which fields of a config the layout's readers use.
      sidecar: makes `lora_layout.json`; None where there is nothing to declare.
    """

    read_as: FileLayout
    parts: Callable[[Draft], Iterator[Part]]
    targets: Callable[[AdapterNames, str, int], Iterable[str]]
    says: Says
    sidecar: Callable[[Draft], dict[str, object] | None] = lambda _: None

    def all_targets(self, sites: Mapping[str, Site], names: AdapterNames) -> Iterator[str]:
        for module, site in sites.items():
            for target in self.targets(names, module, site.num_experts):
                for layer in site.layers:
                    yield full_name(module, layer, target, names.prefixes[0])


LAYOUTS = {
    "peft": WrittenLayout(WRAPPERS, peft.parameters, peft.parameter_targets, Says(True, True, True)),
    "peft-per-expert": WrittenLayout(PER_EXPERT, peft.modules, peft.module_targets, Says(True, True, True)),
    "tinker": WrittenLayout(TINKER, stacks.tinker, stacks.tinker_targets, Says(False, False, False)),
    "tensorrt-llm": WrittenLayout(
        TRTLLM, stacks.trtllm, stacks.trtllm_targets, Says(True, False, True), stacks.trtllm_sidecar
    ),
}


def write_adapter(
    adapter: LoRAAdapter,
    folder: str | Path,
    sites: Mapping[str, Site],
    names: AdapterNames,
    layout: str = "peft",
    *,
    expand: bool = False,
    fold_scale: bool = False,
    force: bool = False,
    generation_config: Mapping[str, object] | None = None,
) -> list[str]:
    """Writes an adapter folder that `read_adapter` reads as the same matrices, ranks and scales.

    Args:
      adapter: what to write.
      folder: where to write it.
      sites: the model's projections.
      names: what the projections are called in adapter files.
      layout: `peft` (3-D parameters, as PEFT writes them with transformers 5), `peft-per-expert` (as with transformers
        4), `tinker`, or `tensorrt-llm`.
      expand: write a copy of a shared matrix for each expert or module that uses it, where the layout cannot share it.
      fold_scale: multiply B by the scale, rounded to B's dtype, where the config has no field for it.
      force: replace the folder, if it holds an adapter.
      generation_config: fields of a `generation_config.json` beside the weights, such as `eos_token_id`; None writes
        none.

    Returns:
      A sentence for each difference from the adapter that computes the same: copies, folded scales, and gate and up
      with different A, which `peft` holds as one projection of both ranks.

    Raises:
      AdapterFormatError: the layout cannot express something; names layer and module.
      InputError: an unknown layout, or a folder that exists or cannot be written.
    """
    plan = plan_adapter(adapter, sites, names, layout, expand=expand, fold_scale=fold_scale)
    planned = {key: Planned(tensor.dtype, tensor.shape) for key, tensor in plan.tensors.items()}
    with whole_folder(folder, CONFIG, flag("force", force)) as partial:
        write_tensors(partial / WEIGHTS, planned, plan.tensors.__getitem__)
        (partial / CONFIG).write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
        for file, fields in ((SIDECAR, plan.sidecar), (GENERATION_CONFIG, generation_config)):
            if fields is not None:
                (partial / file).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    return plan.notes


def plan_adapter(
    adapter: LoRAAdapter,
    sites: Mapping[str, Site],
    names: AdapterNames,
    layout: str = "peft",
    *,
    expand: bool = False,
    fold_scale: bool = False,
) -> Plan:
    """What `write_adapter` would write.

    Args:
      adapter: what to write.
      sites: the model's projections.
      names: what the projections are called in adapter files.
      layout: as for `write_adapter`.
      expand: as for `write_adapter`.
      fold_scale: as for `write_adapter`.

    Raises:
      AdapterFormatError: the layout cannot express something; names layer and module.
      InputError: an unknown layout, or a flag that is neither True nor False.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}.")
    expand, fold_scale = flag("expand", expand), flag("fold_scale", fold_scale)
    target = LAYOUTS[layout]
    check_adapter(adapter, sites, MAX_RANK, np.dtype(np.float32))
    draft = Draft(adapter, sites, names, target.read_as.name, expand, fold_scale)
    prefix = names.prefixes[0]
    parts = [replace(part, prefix=prefix) for part in target.parts(draft)]
    replaced = _whole_matrices(draft, target)
    for part in parts:
        for matrix in (part.a, part.b):
            if matrix.dtype not in DTYPES.values():
                problem = f"its matrices are {matrix.dtype}; expected float32, float16 or bfloat16"
                raise draft.error(part.layer, part.module, problem)
    if not parts:
        raise AdapterFormatError(f"Adapter {adapter.name!r} has rank 0 throughout; there is nothing to write.")
    parts, config = settle(draft, parts, target.says, target.all_targets(sites, names))
    tensors = {key: matrix for part in parts for key, matrix in ((part.key("A"), part.a), (part.key("B"), part.b))}
    tensors |= {f"base_model.model.{with_prefix(path, prefix)}.weight": matrix for path, matrix in replaced.items()}
    config |= {"modules_to_save": [path.rpartition(".")[2] for path in replaced] or None}
    return Plan(tensors, config, target.sidecar(draft), list(draft.notes))


def _whole_matrices(draft: Draft, layout: WrittenLayout) -> dict[str, np.ndarray]:
    """Path of embedding or head -> the matrix that replaces it."""
    paths = {draft.names.dense_path(module): matrix for module, matrix in draft.adapter.replacements.items()}
    for path, matrix in paths.items():
        problem = ""
        if layout.read_as not in (WRAPPERS, PER_EXPERT):
            problem = "this layout has no whole matrices (modules_to_save); PEFT's layouts do"
        elif matrix.dtype not in DTYPES.values():
            problem = f"it is {matrix.dtype}; expected float32, float16 or bfloat16"
        if problem:
            where = f"Adapter {draft.adapter.name!r} cannot be written as {draft.layout}: {path}"
            raise AdapterFormatError(f"{where}: {problem}.")
    return paths
