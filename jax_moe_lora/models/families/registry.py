"""Model families by the `model_type` of their configs."""

from types import ModuleType

from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.families import mixtral, olmoe, qwen2_moe, qwen3_moe

_FAMILIES = {module.MODEL_TYPE: module for module in (qwen3_moe, qwen2_moe, mixtral, olmoe)}


def family(model_type: str | None, source: str = "config") -> ModuleType:
    """The module that reads this family's configs (`read_config`) and names its projections (`ADAPTER_NAMES`)."""
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        message = f"{source}: model_type is {model_type!r}, supported are {known}."
        raise ConfigError(message, file=source, key="model_type", found=repr(model_type), expected=known)
    return _FAMILIES[model_type]
