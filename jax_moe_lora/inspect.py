"""What a folder holds: a model or an adapter, read from configs and headers alone (no weights)."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jax_moe_lora.checkpoint import read_model_config
from jax_moe_lora.errors import AdapterFormatError, CheckpointError
from jax_moe_lora.safetensors_io import TensorInfo, read_json, tensor_infos

_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "BF16": 2,
    "F16": 2,
    "I64": 8,
    "I32": 4,
    "I8": 1,
    "U8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}
_LORA_KEY = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(?P<layer>\d+)\.(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class ModelSummary:
    """A checkpoint: its config in the library's words, and what its shards hold."""

    kind: str
    model_type: str
    layers: int
    routed_layers: int
    experts: int
    experts_per_token: int
    hidden_size: int
    expert_width: int
    parameters: int
    nbytes: int
    dtypes: list[str]
    shards: int
    config: dict[str, Any]


@dataclass(frozen=True)
class ModuleSummary:
    """One kind of projection that an adapter targets.

    Attributes:
      form: `2-D`, `2-D per expert` or `3-D parameter`. shared: sides that several projections use as one matrix.
    """

    module: str
    form: str
    layers: list[int]
    shape_a: list[int]
    shape_b: list[int]
    ranks: list[int]
    shared: str
    nbytes: int


@dataclass(frozen=True)
class AdapterSummary:
    """A PEFT adapter folder."""

    kind: str
    rank: int
    alpha: float
    rank_stabilised: bool
    layers: list[int]
    modules: list[ModuleSummary]
    other_keys: list[str]
    nbytes: int


def inspect_folder(folder: str | Path) -> ModelSummary | AdapterSummary:
    """Summarises a folder by what it holds.

    Raises:
      CheckpointError: neither a model nor an adapter, or files that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}; give a model or adapter folder.")
    if (folder / "adapter_config.json").is_file():
        return inspect_adapter(folder)
    if (folder / "config.json").is_file():
        return inspect_model(folder)
    raise CheckpointError(f"{folder} has neither config.json (a model) nor adapter_config.json (an adapter).")


def inspect_model(folder: Path) -> ModelSummary:
    config = read_model_config(folder)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder} has a config.json and no safetensors files.")
    infos = [info for shard in shards for info in tensor_infos(shard, CheckpointError).values()]
    return ModelSummary(
        kind="model",
        model_type=config.model_type,
        layers=config.num_layers,
        routed_layers=sum(config.moe_layers),
        experts=config.moe.num_experts,
        experts_per_token=config.moe.top_k,
        hidden_size=config.hidden_size,
        expert_width=config.moe.expert_width,
        parameters=sum(math.prod(info.shape) for info in infos),
        nbytes=sum(_nbytes(info) for info in infos),
        dtypes=sorted({info.dtype for info in infos}),
        shards=len(shards),
        config=asdict(config),
    )


def inspect_adapter(folder: Path) -> AdapterSummary:
    raw = read_json(folder / "adapter_config.json", AdapterFormatError)
    infos = tensor_infos(folder / "adapter_model.safetensors", AdapterFormatError)
    rank = int(raw["r"]) if isinstance(raw.get("r"), int) and raw["r"] > 0 else 1
    groups: dict[str, dict[tuple[int, str, str], TensorInfo]] = {}
    other = []
    for key, info in infos.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None or len(info.shape) != 2:
            other.append(key)
            continue
        module = _EXPERT.sub(".experts.*.", f".{match['path']}.").strip(".")
        groups.setdefault(module, {})[int(match["layer"]), match["path"], match["side"]] = info
    modules = [_module(name, group, rank, raw.get("target_parameters") or []) for name, group in sorted(groups.items())]
    return AdapterSummary(
        kind="adapter",
        rank=rank,
        alpha=float(raw.get("lora_alpha") or rank),
        rank_stabilised=bool(raw.get("use_rslora")),
        layers=sorted({layer for module in modules for layer in module.layers}),
        modules=modules,
        other_keys=other,
        nbytes=sum(_nbytes(info) for info in infos.values()),
    )


def _module(
    name: str, group: dict[tuple[int, str, str], TensorInfo], rank: int, parameters: list[str]
) -> ModuleSummary:
    wrapper = name.removesuffix(".base_layer").endswith("experts")
    inner = name.endswith(".base_layer")
    shapes = {side: next(list(i.shape) for (_, _, s), i in group.items() if s == side) for _, _, side in group}
    own_ranks = sorted({info.shape[0] for (_, _, side), info in group.items() if side == "A"})
    if wrapper:
        targets = [p for p in parameters if p.endswith("gate_up_proj") == (inner or len(parameters) == 1)]
        shown = (
            targets[0] if len(parameters) == 1 else ("mlp.experts.gate_up_proj" if inner else "mlp.experts.down_proj")
        )
        fused = shown.endswith("gate_up_proj")
        form, shared, own_ranks = "3-D parameter", "A of gate and up" if fused else "", [rank]
    else:
        shown, shared = name, ""
        form = "2-D per expert" if ".experts.*." in name else "2-D"
    return ModuleSummary(
        module=shown,
        form=form,
        layers=sorted({layer for layer, _, _ in group}),
        shape_a=shapes.get("A", []),
        shape_b=shapes.get("B", []),
        ranks=own_ranks,
        shared=shared,
        nbytes=sum(_nbytes(info) for info in group.values()),
    )


def _nbytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * _ITEM_BYTES.get(info.dtype, 1)
