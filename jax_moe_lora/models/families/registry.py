"""Model families by the `model_type` of their configs."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.families import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe_lite,
    kimi_k2,
    kimi_k25,
    mistral4,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.unsupported import unsupported

FAMILIES: Mapping[str, Family] = {
    module.FAMILY.model_type: module.FAMILY
    for module in (
        qwen3_moe,
        qwen2_moe,
        mixtral,
        olmoe,
        deepseek_v2,
        deepseek_v3,
        kimi_k2,
        kimi_k25,
        glm4_moe_lite,
        mistral4,
    )
}
_WRAPPED = {wrapper: family for family in FAMILIES.values() for wrapper in family.wrappers}


def family(model_type: Any, source: str = "config", raw: Mapping[str, Any] | None = None) -> Family:
    """The family of a config.

    Args:
      model_type: the family's name in `config.json`.
      source: what errors call the file.
      raw: the config, from which an error says what kind of model it is.

    Raises:
      ConfigError: the family is not supported; it says what of it works.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unsupported(model_type, raw or {}, source, list(FAMILIES))
    return FAMILIES[model_type]


def wrapped(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text part, for a wrapper of a supported family; else the config itself.

    Args:
      raw: a whole `config.json`.
    """
    text = raw.get("text_config")
    if isinstance(raw.get("model_type"), str) and raw["model_type"] in _WRAPPED and isinstance(text, Mapping):
        outer = {name: raw[name] for name in ("tie_word_embeddings", "quantization_config") if name in raw}
        return {"model_type": _WRAPPED[raw["model_type"]].model_type} | outer | dict(text)
    return raw
