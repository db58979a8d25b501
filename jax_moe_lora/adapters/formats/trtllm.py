"""TensorRT-LLM: packed tensors of all experts, and the sidecar that says which sides they share.

The folder is one that TensorRT-LLM takes from the hub: `adapter_config.json` (`r`, `lora_alpha`, which scales B, and
`use_rslora`) and `adapter_model.safetensors`. Experts stand under TensorRT-LLM's module names below the experts' path,
`<experts>.moe_h_to_4h.lora_A.weight`: A `[E, R, in]`, B `[E, out, R]`, expert-major. The router is `moe_router` there
(`[1, R, in]`), or has its own path as in PEFT's files; attention has PEFT's names.

`lora_layout.json` declares sides that all experts share. It is metadata: the file may hold E copies, which must be
equal and become one matrix here, or the one matrix with a leading 1. Experts as 2-D matrices may have a sidecar too.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from jax_moe_lora.adapters.formats.adapter_file import AdapterFile, Weights
from jax_moe_lora.adapters.formats.config_fields import shown
from jax_moe_lora.adapters.formats.names import TRTLLM_PARTS
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.formats.tinker import stacks
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.files.safetensors_io import read_json

SIDECAR = "lora_layout.json"
TRTLLM = stacks("TensorRT-LLM", TRTLLM_PARTS)
_MODULES = {part: modules[0] for part, modules in TRTLLM_PARTS.items() if part != "moe_router"}


def share_sides(file: AdapterFile, weights: Weights) -> Weights:
    """The weights with every side that `lora_layout.json` declares as one matrix; unchanged if there is no such file.

    Args:
      file: what the readers share.
      weights: as read from the tensors.

    Raises:
      AdapterFormatError: the sidecar is malformed, or says otherwise than the tensors.
    """
    sidecar = file.path.parent / SIDECAR
    if not os.path.lexists(sidecar):
        return weights
    declared = read_sidecar(sidecar, file.problems)
    merged: dict[int, np.ndarray] = {}  # by the id of what it came from, so that aliases stay aliases
    shared: Weights = {}
    for (layer, module), lora in weights.items():
        sides = {"A": lora.a, "B": lora.b}
        for side, matrices in sides.items() if module in declared else ():
            key, is_shared = f"side {side} of {module} in layer {layer}", declared[module] == side
            with file.problems:
                if len(matrices) == 1 and len(lora.ranks) > 1 and not is_shared:
                    problem = "is one matrix for all experts, which the sidecar does not declare"
                    raise _contradiction(sidecar, key, problem, "one matrix", "its declaration")
                if is_shared and id(matrices) not in merged:
                    present = matrices[lora.ranks > 0] if file.values and len(matrices) > 1 else matrices
                    if file.values and (present != present[:1]).any():
                        problem = "is declared shared, and its experts' matrices differ"
                        raise _contradiction(sidecar, key, problem, "matrices that differ", "equal ones")
                    merged[id(matrices)] = present[:1].copy()
                if is_shared:
                    sides[side] = merged[id(matrices)]
        shared[layer, module] = replace(lora, a=sides["A"], b=sides["B"])
    return shared


def _contradiction(file: Path, key: str, problem: str, found: str, expected: str) -> AdapterFormatError:
    return AdapterFormatError(f"{file}: {key} {problem}.", file=file, key=key, found=found, expected=expected)


def read_sidecar(file: Path, problems: Problems) -> dict[str, str | None]:
    """The declarations of a `lora_layout.json`.

    Args:
      file: its path.
      problems: what becomes of a problem.

    Returns:
      Each module of the experts -> its shared side, `A` or `B`, or None; a module whose entry was refused is left out.
    """
    declared: dict[str, str | None] = {}
    with problems:
        raw = read_json(file, AdapterFormatError)
        modules = raw.get("moe_shared_outer", {})
        # What else it holds is for other readers.
        if raw.get("version", 1) != 1 or not isinstance(modules, dict):
            raise _refusal(file, "", raw, "version 1 and an object moe_shared_outer")
        declared = dict.fromkeys(_MODULES.values())
        for part, entry in modules.items():
            declared.pop(_MODULES.get(part, ""), None)
            with problems:
                sides = [*entry.values()] if isinstance(entry, dict) and set(entry) == {"shared_side"} else []
                if part not in _MODULES or sides not in (["A"], ["B"], [None]):
                    expected = f'one of {", ".join(_MODULES)} as {{"shared_side": "A" or "B"}}'
                    raise _refusal(file, f"moe_shared_outer.{part}", entry, expected)
                declared[_MODULES[part]] = entry["shared_side"]
    return declared


def _refusal(file: Path, key: str, found: object, expected: str) -> AdapterFormatError:
    message = f"{file}{key and ': '}{key} is not understood; expected {expected}."
    return AdapterFormatError(message, file=file, key=key, found=shown(found), expected=expected)
