"""Names and shapes of transformers' models at full size, without weights, beside those that the loader expects."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jax_moe_lora.models.names import plain_name, table, unused_tensors
from jax_moe_lora.models.params import abstract_params
from jax_moe_lora.models.specs.model import ModelConfig
from support.networks import auto_class

Shapes = dict[str, tuple[int, ...]]


def module_shapes(raw: Mapping[str, Any], config: ModelConfig) -> Shapes:
    """The text model's parameters, by their names in transformers' module tree; gate and up of the experts apart."""
    import torch
    from transformers import AutoConfig

    model_type = raw["model_type"]
    hf_config = AutoConfig.for_model(model_type, **{name: raw[name] for name in raw if name != "model_type"})
    with torch.device("meta"):
        model = auto_class(model_type).from_config(hf_config)
    names = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    unused = unused_tensors(config, names)
    shapes: Shapes = {}
    for name, shape in names.items():
        plain = plain_name(config, name)
        if name in unused:
            continue
        if plain.endswith("experts.gate_up_proj"):
            for part in ("gate_proj", "up_proj"):
                shapes[plain.replace("gate_up_proj", part)] = (shape[0], shape[1] // 2, shape[2])
        else:
            shapes[plain] = shape
    return shapes


def expected_shapes(config: ModelConfig) -> Shapes:
    """The same, by the model's one table."""
    params = abstract_params(config, np.float32)
    shapes: Shapes = {"model.embed_tokens.weight": params.embedding.shape, "model.norm.weight": params.norm.shape}
    if params.head is not None:
        shapes["lm_head.weight"] = params.head.shape
    for layer, arrays in enumerate(params.layers):
        for row in table(config, layer):
            path = f"mlp.experts.{row.paths[0].removesuffix('.weight')}" if row.experts else row.paths[0]
            shapes[f"model.layers.{layer}.{path}"] = arrays[row.name].shape
    return shapes
