"""Model families by the `model_type` of their configs."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.families import (
    afmoe,
    bailing_moe,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    exaone_moe,
    flex_olmo,
    gemma4,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granitemoe,
    granitemoeshared,
    hunyuan_v1_moe,
    kimi_k2,
    kimi_k25,
    minimax_m2,
    mistral4,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    qwen3_vl_moe,
    sarvam_moe,
    solar_open,
)
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.unsupported import unsupported
from jax_moe_lora.models.fields import Fields

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
        qwen3_next,
        qwen3_5_moe,
        qwen3_vl_moe,
        granitemoe,
        granitemoeshared,
        phimoe,
        flex_olmo,
        dots1,
        ernie4_5_moe,
        hunyuan_v1_moe,
        exaone_moe,
        solar_open,
        sarvam_moe,
        bailing_moe,
        afmoe,
        gpt_oss,
        glm4_moe,
        minimax_m2,
        gemma4,
    )
}
# What a wrapper says of its other parts, and of the tokens that stand for their data.
_OF_WRAPPERS = (
    *("vision_config", "audio_config", "image_token_id", "video_token_id", "audio_token_id"),
    *("vision_start_token_id", "vision_end_token_id", "language_model_only"),
    *("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id", "eoa_token_index"),
    *("vision_soft_tokens_per_image", "image_token_index", "vision_feature_layer", "spatial_merge_size"),
    *("projector_hidden_act", "multimodal_projector_bias"),
)
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


def wrapped(raw: Mapping[str, Any], source: str = "config") -> Mapping[str, Any]:
    """The config of the text part, for a wrapper of a supported family; else the config itself.

    Args:
      raw: a whole `config.json`.
      source: what errors call the file.

    Raises:
      ConfigError: a field of the wrapper may change what the text part computes, by name.
    """
    text = raw.get("text_config")
    if not isinstance(raw.get("model_type"), str) or raw["model_type"] not in _WRAPPED or not isinstance(text, Mapping):
        return raw
    outer = Fields(raw, source, any_value=_OF_WRAPPERS)
    kept = {name: outer.get(name) for name in ("tie_word_embeddings", "quantization_config", "eos_token_id")}
    outer.get("text_config")
    outer.refuse_unknown()
    # Whether the head is tied is the wrapper's to say; its text part may have another default.
    text = {name: value for name, value in text.items() if name != "tie_word_embeddings"}
    kept = {name: value for name, value in kept.items() if value is not None and text.get(name) is None}
    return {"model_type": _WRAPPED[raw["model_type"]].model_type} | text | kept
