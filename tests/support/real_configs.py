"""Published configs: the tensors that transformers would save for them, without any weights."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from jax_moe_lora.models.checkpoint_tensors import joined_of, stacks_of
from jax_moe_lora.models.config_file import parse_model_config
from jax_moe_lora.models.names import plain_name, tensor_names, unused_tensors
from jax_moe_lora.models.params import abstract_params, leaf_name
from jax_moe_lora.models.specs.model import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """A config, as the library reads it; of a wrapper its text part."""
    return parse_model_config(raw)


def saved_shapes(raw: Mapping[str, Any]) -> Shapes:
    """What `save_pretrained` of transformers writes for a config: its model on the meta device, in the saved form."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    auto = AutoModelForImageTextToText if "text_config" in raw else AutoModelForCausalLM
    kind = auto._model_mapping[type(config)]
    with torch.device("meta"):
        model = kind(config)
    tensors = dict(model.state_dict())
    for tied in model.all_tied_weights_keys:
        tensors.pop(tied, None)
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, tensors).items()}


def expected_shapes(config: ModelConfig, saved: Shapes) -> Shapes:
    """What the loader looks for; experts that a checkpoint has in stacks are looked for there."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_params(config, "bfloat16"))
    shapes = {".".join(map(leaf_name, path)): leaf.shape for path, leaf in leaves}
    expected: Shapes = {}
    for path, source in tensor_names(config).items():
        expected |= {source: shapes[path]} if isinstance(source, str) else dict.fromkeys(source, shapes[path][1:])
    written = {name: name for name in saved}
    for stack in [*stacks_of(config, written), *joined_of(config, written)]:
        for member in stack.members:
            del expected[member]
        expected[stack.tensor] = stack.shape
    return expected


def check_tensors(raw: Mapping[str, Any]) -> int:
    """Names and shapes are those of transformers; the number of parameters."""
    config, saved = read(raw), saved_shapes(raw)
    unused = unused_tensors(config, saved)
    saved = {plain_name(config, name): shape for name, shape in saved.items() if name not in unused}
    expected = expected_shapes(config, saved)
    assert not sorted(saved.keys() ^ expected.keys())[:10]
    assert not {name: (shape, saved[name]) for name, shape in expected.items() if shape != saved[name]}
    return sum(map(math.prod, saved.values()))
