"""Model families by the `model_type` of their configs."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from jax_moe_lora.models.families import mixtral, olmoe, qwen2_moe, qwen3_moe
from jax_moe_lora.models.families.unsupported import unsupported

_FAMILIES = {module.MODEL_TYPE: module for module in (qwen3_moe, qwen2_moe, mixtral, olmoe)}


def family(model_type: Any, source: str = "config", raw: Mapping[str, Any] | None = None) -> ModuleType:
    """The module that reads a family's configs (`read_config`) and names its projections (`ADAPTER_NAMES`).

    Args:
      model_type: the family's name in `config.json`.
      source: what errors call the file.
      raw: the config, from which an error says what kind of model it is.

    Raises:
      ConfigError: the family is not supported; it says what of it works.
    """
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise unsupported(model_type, raw or {}, source, list(_FAMILIES))
    return _FAMILIES[model_type]
