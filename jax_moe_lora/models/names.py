"""The one table of a model's parameters, and what follows from it for names in checkpoints and adapters."""

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from jax_moe_lora.adapters.formats.names import TEXT, AdapterNames, without_prefix
from jax_moe_lora.models.families.registry import family
from jax_moe_lora.models.specs.model import Layer, ModelConfig, layer_parameters
from jax_moe_lora.models.specs.parameter import Parameter


@lru_cache(maxsize=512)
def _table(layer: Layer, hidden_size: int, model_type: str) -> tuple[Parameter, ...]:
    paths = family(model_type).paths
    rows = layer_parameters(layer, hidden_size)
    return tuple(replace(row, paths=paths[row.name]) if row.name in paths else row for row in rows)


def table(config: ModelConfig, layer: int) -> tuple[Parameter, ...]:
    """The parameters of a layer, with the family's own names for them.

    Args:
      config: the model.
      layer: its number.
    """
    return _table(config.layers[layer], config.hidden_size, config.model_type)


def adapter_names(config: ModelConfig) -> AdapterNames:
    """Where the model's projections stand in adapter files.

    Args:
      config: the model.
    """
    of = family(config.model_type)
    dense: dict[str, str] = {}
    variants: dict[str, tuple[str, ...]] = {}
    experts: dict[str, str] = {}
    for spec in dict.fromkeys(config.layers):
        for row in _table(spec, config.hidden_size, config.model_type):
            if row.projection and row.experts:
                experts.update(dict.fromkeys(row.modules, row.name))
            for path in row.modules if row.projection and not row.experts else ():
                if row.name not in (dense.setdefault(path, row.name), *variants.get(path, ())):
                    variants[path] = (*variants.get(path, ()), row.name)
    return AdapterNames(
        dense=dense,
        experts=experts,
        experts_path=of.experts_path,
        per_expert_path=of.per_expert_path,
        interleaved=of.interleaved,
        stored_in_out=of.stored_in_out,
        prefixes=(*of.prefixes, TEXT) if config.wrapped else (TEXT, *of.prefixes),
        variants=variants,
        joined={
            tensor.removesuffix(".weight"): members
            for tensor, members in of.joined.items()
            if tensor.endswith(".weight")
        },
    )


def experts_below(config: ModelConfig, layer: int) -> str:
    """Path of a layer's experts where each has tensors of its own."""
    of = family(config.model_type)
    return f"model.layers.{layer}.{of.per_expert_path or of.experts_path}"


def parameter_tensors(config: ModelConfig, layer: int, row: Parameter) -> str | list[str]:
    """The checkpoint's tensor of a parameter, or one tensor per expert.

    Args:
      config: the model.
      layer: its number.
      row: of the layer's table.
    """
    if not row.experts:
        return f"model.layers.{layer}.{row.paths[-1]}"
    return [f"{experts_below(config, layer)}.{expert}.{row.paths[-1]}" for expert in range(row.shape[0])]


def tensor_names(config: ModelConfig) -> dict[str, str | list[str]]:
    """Path in the parameter tree -> checkpoint tensor, or one tensor an expert where the leaf stacks them."""
    tensor_of: dict[str, str | list[str]] = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    if config.norm.kind == "layer":
        tensor_of["norm_bias"] = "model.norm.bias"
    if not config.tie_embeddings:
        tensor_of["head"] = "lm_head.weight"
    if config.head_bias:
        tensor_of["head_bias"] = "lm_head.bias"
    for layer in range(config.num_layers):
        for row in table(config, layer):
            tensor_of[f"layers.{layer}.{row.name}"] = parameter_tensors(config, layer, row)
    return tensor_of


def projection_tensors(config: ModelConfig) -> dict[tuple[int, str], list[str]]:
    """(layer, module) of each projection of the layers -> its checkpoint tensors, one per expert."""
    tensors: dict[tuple[int, str], list[str]] = {}
    for layer in range(config.num_layers):
        for row in table(config, layer):
            if row.projection:
                stack = parameter_tensors(config, layer, row)
                tensors[layer, row.name] = [stack] if isinstance(stack, str) else stack
    return tensors


def outer_tensors(config: ModelConfig) -> dict[str, str]:
    """Embedding and head -> their checkpoint tensors, which are one where they are tied."""
    embedding = "model.embed_tokens.weight"
    return {"embedding": embedding, "head": embedding if config.tie_embeddings else "lm_head.weight"}


def other_names(config: ModelConfig) -> dict[str, str]:
    """Checkpoint tensors that have a second name, which transformers 5 writes -> that name."""
    return {
        f"model.layers.{layer}.{row.paths[-1]}": f"model.layers.{layer}.{row.paths[0]}"
        for layer in range(config.num_layers)
        for row in table(config, layer)
        if len(row.paths) > 1 and not row.experts
    }


def plain_name(config: ModelConfig, tensor: str) -> str:
    """The name that a tensor has in a checkpoint of the text model alone.

    Args:
      config: the model.
      tensor: its name in the checkpoint.
    """
    of = family(config.model_type)
    for pattern, plain in of.renames.items():
        if found := re.match(pattern, tensor):
            return plain + tensor[found.end() :]
    return without_prefix(tensor, of.prefixes)


def unused_tensors(config: ModelConfig, tensors: Iterable[str]) -> dict[str, str]:
    """Tensors that may stand in a checkpoint and are not read.

    Args:
      config: the model.
      tensors: names in the checkpoint.

    Returns:
      Name -> what it is.
    """
    of = family(config.model_type)
    patterns = dict(of.unused)
    if config.tie_embeddings:
        patterns[r"(model\.)?lm_head\.weight"] = "a tied head, saved all the same"
    found: dict[str, str] = {}
    for name in tensors:
        plain = plain_name(config, name)
        layer = re.match(r"model\.layers\.(\d+)\.", plain)
        if of.prediction_layers and layer and int(layer[1]) >= config.num_layers:
            found[name] = "a layer that predicts further tokens (MTP)"
        elif what := next((what for pattern, what in patterns.items() if re.fullmatch(pattern, name)), ""):
            found[name] = what
    return found
