"""Everything that is wrong with an adapter's folder, by the readers that load it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jax_moe_lora.adapters.formats.adapter_file import OUTSIDE, AdapterFile, Headers, pair_keys
from jax_moe_lora.adapters.formats.base_checkpoint import BaseCheckpoint
from jax_moe_lora.adapters.formats.detect import open_adapter, read_weights
from jax_moe_lora.adapters.formats.embedding_copies import check_copies, without_copies
from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.adapters.formats.peft_config import PeftConfig
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.formats.saved_modules import read_saved_modules
from jax_moe_lora.adapters.formats.trained_tokens import add_trained_tokens, token_rows
from jax_moe_lora.adapters.formats.trtllm import SIDECAR, read_sidecar
from jax_moe_lora.adapters.formats.weights import AdapterTensors
from jax_moe_lora.adapters.lora import LoRAAdapter, Site
from jax_moe_lora.adapters.packing import bank_nbytes
from jax_moe_lora.adapters.validation.bank_rules import violations
from jax_moe_lora.adapters.validation.finding import Finding, finding_of
from jax_moe_lora.adapters.validation.grouping import grouped
from jax_moe_lora.adapters.validation.hints import hints
from jax_moe_lora.adapters.validation.values import CheckedTensors
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.sizes import format_bytes


@dataclass(frozen=True)
class Target:
    """What an adapter is to be served by: a model's projections, and a bank.

    Attributes:
      sites: the model's projections.
      names: where they stand in adapter files.
      base: the model's checkpoint.
      max_rank: the largest rank that the bank takes.
      dtype: the bank's.
      b_layout: as `read_adapter` takes it.
    """

    sites: Mapping[str, Site]
    names: AdapterNames
    base: BaseCheckpoint
    max_rank: int
    dtype: np.dtype
    b_layout: str | None = None


@dataclass(frozen=True)
class Report:
    """What a validation has found.

    Attributes:
      findings: errors first; what holds for many tensors is one finding.
      layout: of the experts, by its keys; empty where no key was understood.
      bank_bytes: of the bank's pages that it takes; None with an error.
    """

    findings: list[Finding]
    layout: str = ""
    bank_bytes: int | None = None

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]


def examine(folder: Path, target: Target | None, deep: bool = False) -> Report:
    """Checks all that can be checked; what is broken hides nothing but itself.

    Args:
      folder: the adapter's.
      target: what is to serve it; None checks only what an adapter is by itself.
      deep: read the weights too, not their headers alone.
    """
    problems, warnings = Problems(keep=True), list[Finding]()
    layout, nbytes = "", None
    opened = False
    with problems, open_adapter(folder, problems) as (config, tensors):
        opened = True
        layout, nbytes = _check(folder, config, tensors, target, deep, problems, warnings)
    if not opened and os.path.lexists(folder / SIDECAR):
        read_sidecar(folder / SIDECAR, problems)
    # Two steps may meet the same problem.
    findings = grouped(list(dict.fromkeys([finding_of(error) for error in problems.found] + warnings)))
    return Report(findings, layout, None if problems.found else nbytes)


def _check(
    folder: Path,
    config: PeftConfig,
    tensors: AdapterTensors,
    target: Target | None,
    deep: bool,
    problems: Problems,
    warnings: list[Finding],
) -> tuple[str, int | None]:
    """(layout, bytes in the bank) of an open folder; what is wrong goes into `problems` and `warnings`."""
    path, infos = tensors.path, without_copies(tensors.infos)
    pairs = pair_keys(path, infos, problems)
    if target is None:
        return "", None
    if deep:
        check_copies(tensors, config.replaced_modules, target.base, problems)
    source = CheckedTensors(tensors, target.dtype, problems, warnings) if deep else Headers(tensors.infos)
    file = AdapterFile(path, config, target.sites, target.names, source, problems, deep, target.b_layout)
    weights = read_weights(file, pairs)
    add_trained_tokens(file, tensors.infos, target.base, weights)
    replacements = read_saved_modules(file, tensors, target.base, weights)
    adapter = LoRAAdapter(folder.name, weights, config.raw, file.layout, replacements)
    for bad in violations(adapter, target.sites, target.max_rank):
        with problems:
            key = file.keys[bad.layer, bad.module]
            raise AdapterFormatError(
                f"{path}: {key}: {bad.problem}", file=path, key=key, found=bad.found, expected=bad.expected
            )
    warnings += hints(file)
    for pair in [*pairs, *token_rows(infos).values()]:
        if pair.layer == OUTSIDE:
            message = f"{path}: {pair.path} is served by a model that is loaded with adapter_targets='all'."
            warnings.append(Finding("warning", str(path), pair.path, "a module of the layers", pair.path, message))
    for key, matrix in {file.keys[OUTSIDE, module]: matrix for module, matrix in replacements.items()}.items():
        size = format_bytes(matrix.size * target.dtype.itemsize)
        message = f"{path}: {key} is a whole matrix of {size}, served by a model that is loaded with max_replacements."
        warnings.append(Finding("warning", str(path), key, "no whole matrix", size, message))
    fits = not problems.found
    return file.layout, bank_nbytes(adapter, target.sites, target.dtype) if fits else None
