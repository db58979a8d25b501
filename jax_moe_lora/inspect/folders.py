"""Summary of a folder with a model or an adapter, from its configs and file headers alone; no weights are read."""

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jax_moe_lora.adapters.formats.adapter_file import DENSE_ONLY, OUTER_KEY, OUTSIDE, TOKENS_KEY
from jax_moe_lora.adapters.formats.config_reading import describe_peft_config
from jax_moe_lora.adapters.formats.detect import layout_of
from jax_moe_lora.adapters.formats.embedding_copies import saved_keys
from jax_moe_lora.adapters.formats.look_around import adapters_below
from jax_moe_lora.adapters.formats.names import any_prefix, plain_key
from jax_moe_lora.adapters.formats.peft_config import PeftConfig
from jax_moe_lora.adapters.formats.weights import open_weights
from jax_moe_lora.errors import CheckpointError
from jax_moe_lora.files.safetensors_header import TensorInfo
from jax_moe_lora.files.safetensors_io import tensor_infos
from jax_moe_lora.models.config_file import read_model_config
from jax_moe_lora.models.quantised.summary import FormatSummary, summarise_formats

_LORA_KEY = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(?P<layer>\d{1,9})\.(?P<path>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERTS = re.compile(r"(?:.+\.)?experts(?P<rest>(?:\..+)?)")


@dataclass(frozen=True)
class ModelSummary:
    """A checkpoint: its config in the library's terms, and the tensors in its shards.

    Attributes:
      kind: always `model`.
      model_type: the family, as `config.json` names it.
      layers: number of decoder layers.
      routed_layers: number of layers with routed experts.
      experts: routed experts per layer.
      experts_per_token: experts chosen per token.
      hidden_size: model width.
      expert_width: an expert's intermediate width.
      parameters: number of values in all tensors; of quantised ones those that they hold, without scales.
      nbytes: bytes of all tensors.
      dtypes: the tensors' dtypes, as safetensors names them.
      shards: number of safetensors files.
      formats: the formats of quantised matrices; empty where there are none.
      config: every field of the library's `ModelConfig`.
    """

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
    formats: list[FormatSummary]
    config: dict[str, Any]


@dataclass(frozen=True)
class ModuleSummary:
    """One kind of projection that an adapter targets.

    Attributes:
      module: the module's name, with `*` for the number of an expert.
      form: how the file stores A and B: `2-D`; `2-D per expert`; `3-D parameter`, with rank * E rows in A and columns
        in B; `stack`, with A `[E or 1, rank, in]` and B `[E or 1, out, rank]`; `trained tokens`, with a row of the
        embeddings for each token in place of B; or `whole matrix`, which replaces the model's and stands in place of B.
      layers: the layers that the adapter changes, ascending; empty for head and embedding, which are in none.
      shape_a: the shape of one A in the file; empty if there is none.
      shape_b: the shape of one B in the file; empty if there is none.
      ranks: the ranks that occur, ascending.
      shared: the sides that several projections or experts share as one matrix; empty if none.
      nbytes: bytes of all its A and B.
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
    """An adapter folder.

    Attributes:
      kind: always `adapter`.
      layout: the names of the layouts in which the file stores the experts.
      rank: the config's rank.
      alpha: the config's alpha.
      rank_pattern: modules with another rank than `rank`.
      alpha_pattern: modules with another alpha than `alpha`.
      rank_stabilised: the scale is alpha / sqrt(rank) (rsLoRA), not alpha / rank.
      layers: the layers that the adapter changes, ascending.
      modules: the kinds of projections that it changes.
      other_keys: tensors of the file that are not a LoRA A or B of a layer.
      nbytes: bytes of all tensors.
    """

    kind: str
    layout: str
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rank_stabilised: bool
    layers: list[int]
    modules: list[ModuleSummary]
    other_keys: list[str]
    nbytes: int


def inspect_folder(folder: str | Path) -> ModelSummary | AdapterSummary:
    """Summarises a model folder or an adapter folder.

    Args:
      folder: the folder; one with an `adapter_config.json` is an adapter.

    Returns:
      The summary of the model or of the adapter.

    Raises:
      CheckpointError: the folder holds neither a model nor an adapter, or the model's files cannot be read.
      AdapterFormatError: the adapter's files cannot be read.
    """
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the model or adapter folder that holds it.")
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}; give a model or adapter folder.")
    if (folder / "adapter_config.json").is_file():
        return inspect_adapter(folder)
    if (folder / "config.json").is_file():
        return inspect_model(folder)
    inner = ", ".join(map(str, adapters_below(folder)[:5]))
    there = f"; there are adapters one folder deeper: {inner}" if inner else ""
    raise CheckpointError(f"{folder} has neither config.json (a model) nor adapter_config.json (an adapter){there}.")


def inspect_model(folder: Path) -> ModelSummary:
    """Summarises a model folder.

    Args:
      folder: a folder with a `config.json` and safetensors files.

    Returns:
      The summary.

    Raises:
      CheckpointError: files are missing or cannot be read.
    """
    config = read_model_config(folder)
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise CheckpointError(f"{folder} has a config.json but no safetensors files.")
    infos = [info for shard in shards for info in tensor_infos(shard, CheckpointError).values()]
    formats, others = summarise_formats(folder, config)
    in_few_bits = others + sum(one.parameters for one in formats)
    return ModelSummary(
        kind="model",
        model_type=config.model_type,
        layers=config.num_layers,
        routed_layers=len(config.routed_layers),
        experts=config.moe.num_experts,
        experts_per_token=config.moe.top_k,
        hidden_size=config.hidden_size,
        expert_width=config.moe.expert_width,
        parameters=in_few_bits if formats else sum(math.prod(info.shape) for info in infos),
        nbytes=sum(info.nbytes for info in infos),
        dtypes=sorted({info.dtype for info in infos}),
        shards=len(shards),
        formats=formats,
        config=asdict(config),
    )


def inspect_adapter(folder: Path) -> AdapterSummary:
    """Summarises an adapter folder.

    Args:
      folder: a folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
      The summary.

    Raises:
      AdapterFormatError: files are missing, cannot be read, or disagree about a rank.
    """
    config = describe_peft_config(folder)
    with open_weights(folder) as tensors:
        infos = tensors.infos
    matrices = {key: plain_key(key) for key, info in infos.items() if len(info.shape) in (2, 3)}
    keys = {key: match for key, plain in matrices.items() if (match := _LORA_KEY.fullmatch(plain))}
    paths = {(int(match["layer"]), match["path"]) for match in keys.values()}
    groups: dict[str, list[_Matrix]] = {}
    for key, match in keys.items():
        layer, path = int(match["layer"]), match["path"]
        parameter = _parameter(layer, path, paths, config)
        module = parameter or _EXPERT.sub(".experts.*.", f".{path}.").strip(".")
        rank, _ = config.rank_and_scale(*any_prefix(f"model.layers.{layer}.{module}"))
        if parameter and match["side"] == "A" and infos[key].shape[0] % rank:
            raise config.error(f"it gives {key} rank {rank}, which does not divide its {infos[key].shape[0]} rows")
        rows = rank if parameter else infos[key].shape[-2]
        groups.setdefault(module, []).append(_Matrix(layer, match["side"], infos[key], rows, bool(parameter)))
    outer = {key: match for key in infos if (match := OUTER_KEY.fullmatch(plain_key(key)))}
    for key, match in outer.items():
        side, path = match["side"] or match["lookup"], match["path"]
        rank = infos[key].shape[0 if side == "A" else -1]
        groups.setdefault(path, []).append(_Matrix(OUTSIDE, side, infos[key], rank, parameter=False))
    modules = [_module(name, group) for name, group in sorted(groups.items())]
    tokens = {
        key: match for key in infos if (match := TOKENS_KEY.fullmatch(plain_key(key))) and len(infos[key].shape) == 2
    }
    modules += [_tokens(match["path"], infos[key]) for key, match in tokens.items()]
    saved = {keys[0]: path for path, keys in saved_keys(infos, config.replaced_modules).items()}
    modules += [_whole(path, infos[key]) for key, path in saved.items()]
    return AdapterSummary(
        kind="adapter",
        layout=_layout({path for _, path in paths}),
        rank=config.rank,
        alpha=config.alpha,
        rank_pattern=dict(config.rank_patterns),
        alpha_pattern=dict(config.alpha_patterns),
        rank_stabilised=config.rank_stabilised,
        layers=sorted({layer for module in modules for layer in module.layers}),
        modules=modules,
        other_keys=[key for key in infos if key not in {*keys, *outer, *tokens, *saved}],
        nbytes=sum(info.nbytes for info in infos.values()),
    )


@dataclass(frozen=True)
class _Matrix:
    """One A or B of a file.

    Attributes:
      layer: the layer's number.
      side: `A` or `B`.
      info: shape, dtype and bytes.
      rank: the adapter's rank here.
      parameter: whether it belongs to a 3-D parameter.
    """

    layer: int
    side: str
    info: TensorInfo
    rank: int
    parameter: bool


def _parameter(layer: int, path: str, paths: set[tuple[int, str]], config: PeftConfig) -> str | None:
    """The 3-D parameter that a wrapper of PEFT belongs to; None if it wraps something else.

    Of two nested wrappers, the inner one is on `gate_up_proj`. For a single one, the config says which it is.
    """
    experts = path.removesuffix(".base_layer")
    if not experts.endswith("experts"):
        return None
    if (layer, f"{experts}.base_layer") in paths:
        fused = path != experts
    else:
        fused = any(map(config.targets_parameter, any_prefix(f"model.layers.{layer}.{experts}.gate_up_proj")))
    return f"{experts}.{'gate_up_proj' if fused else 'down_proj'}"


def _layout(paths: set[str]) -> str:
    """The names of the layouts in which the file stores the experts."""
    rests = {match["rest"] for path in paths if (match := _EXPERTS.fullmatch(path))}
    names = {layout.name for rest in rests if (layout := layout_of(rest))}
    return ", ".join(sorted(names)) or DENSE_ONLY


def _module(name: str, group: list[_Matrix]) -> ModuleSummary:
    """Summarises the matrices of one kind of projection, over all layers and experts."""
    stack = len(group[0].info.shape) == 3
    form = "3-D parameter" if group[0].parameter else "2-D per expert" if ".experts.*." in name else "2-D"
    shapes = {matrix.side: list(matrix.info.shape) for matrix in reversed(group)}
    return ModuleSummary(
        module=name,
        form="stack" if stack else form,
        layers=sorted({matrix.layer for matrix in group if matrix.layer != OUTSIDE}),
        shape_a=shapes.get("A", []),
        shape_b=shapes.get("B", []),
        ranks=sorted({matrix.rank for matrix in group if matrix.side == "A"}),
        shared=", ".join(
            (["A of gate and up"] if form == "3-D parameter" and name.endswith("gate_up_proj") else [])
            + [f"{side} of all experts" for side, shape in sorted(shapes.items()) if stack and shape[0] == 1]
        ),
        nbytes=sum(matrix.info.nbytes for matrix in group),
    )


def _tokens(path: str, info: TensorInfo) -> ModuleSummary:
    """Rows that replace some of the base model's; each takes a rank in a bank."""
    return ModuleSummary(path, "trained tokens", [], [], list(info.shape), [info.shape[0]], "", info.nbytes)


def _whole(path: str, info: TensorInfo) -> ModuleSummary:
    """A whole matrix in place of the model's (`modules_to_save`)."""
    return ModuleSummary(path, "whole matrix", [], [], list(info.shape), [], "", info.nbytes)
