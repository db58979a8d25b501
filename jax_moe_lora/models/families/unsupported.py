"""What is said of a `model_type` that is not supported: what kind of model it is, and what of it works."""

from collections.abc import Mapping, Sequence
from typing import Any

from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.families.lacks import LACKS

_SOFTMAX = 'router="softmax_topk"'
_CHOSEN_SOFTMAX = 'router="topk_softmax"'
_SIGMOID = 'router="sigmoid_bias"'
# Routers that limit the choice to groups of experts, or that have no kind here.
_OWN_ROUTER = "the experts that the model's own router chose"

LAYER_SETTINGS: Mapping[str, str] = {
    "dbrx": f"{_SOFTMAX}, renormalize=True",
    "deepseek_v32": _OWN_ROUTER,
    "deepseek_v4": _OWN_ROUTER,
    "granitemoehybrid": _CHOSEN_SOFTMAX,
    "jamba": _SOFTMAX,
    "kimi_linear": _OWN_ROUTER,
    "lfm2_moe": _SIGMOID,
    "longcat_flash": _OWN_ROUTER,
    "minimax": f"{_SOFTMAX}, renormalize=True",
}
"""Families that are not supported as models (`LACKS`) -> how their routed experts alone run, where they do."""

# Fields that hold the number of routed experts, whichever family wrote the config.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
# Fields that hold the config of a multimodal model's text part.
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config")


def unsupported(model_type: Any, raw: Mapping[str, Any], source: str, supported: Sequence[str]) -> ConfigError:
    """The error for a config of another family.

    Args:
      model_type: what the config says.
      raw: the config.
      source: what errors call the file.
      supported: the families that are supported.

    Returns:
      A `ConfigError` to raise: what kind of model it is, what of it works, and which families are supported.
    """
    families = ", ".join(supported)
    text = _text_config(raw)
    begin = f"{source}: model_type is {model_type!r}"
    if text is not None:
        message = f"{begin}, a multimodal model, which is not supported. {_text_part(text, supported)}"
    elif isinstance(model_type, str) and model_type in LACKS:
        message = (
            f"{begin}, a Mixture-of-Experts family that is not supported as a whole: it needs {LACKS[model_type]}."
            f"{_experts_alone(model_type)}"
        )
    elif isinstance(model_type, str) and not any(raw.get(name) for name in _EXPERTS):
        message = f"{begin}, a dense model by its fields: it names no number of experts ({', '.join(_EXPERTS[:3])})."
    else:
        message = f"{begin}, which is not a known family."
    return ConfigError(
        f"{message} Supported are {families}.",
        file=source,
        key="model_type",
        found=repr(model_type),
        expected=families,
    )


def _text_config(raw: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The config of the text part, which may lie in that of a part; None in a config of text alone."""
    inner = next((raw[name] for name in _TEXT if isinstance(raw.get(name), Mapping)), None)
    return None if inner is None else _text_config(inner) or inner


def _text_part(text: Mapping[str, Any], supported: Sequence[str]) -> str:
    inner = text.get("model_type")
    if inner in supported:
        return (
            f"Its text part is {inner!r}, which is supported: save that part alone, as a causal language model of "
            "transformers, and give the new folder."
        )
    if isinstance(inner, str) and inner in LACKS:
        return f"Its text part, {inner!r}, is not supported either: it needs {LACKS[inner]}.{_experts_alone(inner)}"
    dense = "" if any(text.get(name) for name in _EXPERTS) else ", which is dense by its fields"
    return f"Its text part is {inner!r}{dense}."


def _experts_alone(model_type: str) -> str:
    settings = LAYER_SETTINGS.get(model_type)
    if settings is None:
        return ""
    if settings == _OWN_ROUTER:
        return f" Its routed experts alone run through jax_moe_lora.routed_experts, given {settings}."
    return f" Its routed experts alone run through jax_moe_lora.moe_lora with MoEConfig(..., {settings})."
