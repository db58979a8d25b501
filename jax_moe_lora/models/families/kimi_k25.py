"""Kimi K2.5: the text part of a multimodal model, which is Kimi K2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax_moe_lora.adapters.formats.names import WRAPPED
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.families import deepseek_v3
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.specs.model import ModelConfig

TEXT_TYPES = (None, "kimi_k2", "deepseek_v3")


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The config of the text part.

    What stands beside it describes images, except for what both have: the wrapper says whether the head is tied, and
    either of them whether the checkpoint is quantised.

    Args:
      raw: `config.json`, of the whole model.
      generation: `generation_config.json`, or None.
      source: what errors call the file.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    text = raw.get("text_config")
    if not isinstance(text, Mapping) or text.get("model_type") not in TEXT_TYPES:
        found = text.get("model_type") if isinstance(text, Mapping) else text
        message = f"{source}: text_config is {found!r}, an object of the model type kimi_k2 was expected."
        raise ConfigError(message, file=source, key="text_config", found=repr(found)[:200], expected="kimi_k2")
    # The class ties them where it is not told.
    outer = {"tie_word_embeddings": raw.get("tie_word_embeddings", True)}
    outer |= {name: raw[name] for name in ("quantization_config",) if raw.get(name)}
    config = deepseek_v3.read_config({**text, **outer}, generation, source, model_type="kimi_k25")
    return replace(config, wrapped=True)


FAMILY = Family(
    "kimi_k25",
    read_config,
    prefixes=WRAPPED,
    renames={
        # Transformers 5 saves the text part's layers by the name that those of its images have.
        r"language_model\.model\.blocks\.": "model.layers.",
        r"language_model\.model\.": "model.",
        r"language_model\.lm_head\.": "lm_head.",
        r"model\.language_model\.": "model.",
    },
    unused={
        r"(model\.)?vision_tower\..*": "a part for images",
        r"(model\.)?mm_projector\..*": "a part for images",
    },
)
