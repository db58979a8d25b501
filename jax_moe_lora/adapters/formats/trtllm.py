"""TensorRT-LLM: packed tensors of all experts, and the sidecar that says which sides they share.

The folder is one that TensorRT-LLM takes from the hub: `adapter_config.json` (`r`, `lora_alpha`, which scales B, and
`use_rslora`) and `adapter_model.safetensors`. Experts stand under TensorRT-LLM's module names below the experts' path,
`<experts>.moe_h_to_4h.lora_A.weight`: A `[E, R, in]`, B `[E, out, R]`, expert-major. The router is `moe_router` there
(`[1, R, in]`), or has its own path as in PEFT's files; attention has PEFT's names.

`lora_layout.json` declares sides that all experts share. It is metadata: the file may hold E copies, which must be
equal and become one matrix here, or the one matrix with a leading 1. Experts as 2-D matrices may have a sidecar too.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from jax_moe_lora.adapters.formats.adapter_file import Weights
from jax_moe_lora.adapters.formats.names import TRTLLM_PARTS
from jax_moe_lora.adapters.formats.tinker import stacks
from jax_moe_lora.errors import AdapterFormatError
from jax_moe_lora.safetensors_io import read_json

SIDECAR = "lora_layout.json"
TRTLLM = stacks("TensorRT-LLM", TRTLLM_PARTS)
_MODULES = {part: modules[0] for part, modules in TRTLLM_PARTS.items() if part != "moe_router"}


def share_sides(folder: Path, weights: Weights) -> Weights:
    """The weights with every side that `lora_layout.json` declares as one matrix; unchanged where there is none.

    Raises:
      AdapterFormatError: the sidecar is malformed, or says otherwise than the tensors.
    """
    file = folder / SIDECAR
    if not file.exists():
        return weights
    declared = _read_sidecar(file)
    merged: dict[int, np.ndarray] = {}  # by the id of what it came from, so that aliases stay aliases
    shared: Weights = {}
    for (layer, module), own in weights.items():
        sides = {"A": own.a, "B": own.b}
        for side, matrices in sides.items() if module in _MODULES.values() else ():
            where = f"{file}: side {side} of {module} in layer {layer}"
            if len(matrices) == 1 and len(own.ranks) > 1 and declared.get(module) != side:
                raise AdapterFormatError(f"{where} is one matrix for all experts, which the sidecar does not declare.")
            if declared.get(module) != side:
                continue
            present = matrices if len(matrices) == 1 else matrices[own.ranks > 0]
            if (present != present[:1]).any():
                raise AdapterFormatError(f"{where} is declared shared, and its experts' matrices differ.")
            sides[side] = merged.setdefault(id(matrices), present[:1].copy())
        shared[layer, module] = replace(own, a=sides["A"], b=sides["B"])
    return shared


def _read_sidecar(file: Path) -> dict[str, str | None]:
    """Module -> its shared side, if any."""
    raw = read_json(file, AdapterFormatError)
    modules = raw.get("moe_shared_outer", {})
    unknown = set(raw) - {"version", "moe_shared_outer"}
    if raw.get("version", 1) != 1 or unknown or not isinstance(modules, dict):
        raise AdapterFormatError(
            f"{file} is not understood; expected version 1 and an object moe_shared_outer, no more."
        )
    for part, entry in modules.items():
        sides = [*entry.values()] if isinstance(entry, dict) and set(entry) == {"shared_side"} else []
        if part not in _MODULES or sides not in (["A"], ["B"], [None]):
            raise AdapterFormatError(
                f"{file}: moe_shared_outer.{part} is not understood; expected one of {', '.join(_MODULES)} "
                'as {"shared_side": "A" or "B"}.'
            )
    return {_MODULES[part]: entry["shared_side"] for part, entry in modules.items()}
