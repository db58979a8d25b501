"""Fields of `adapter_config.json` that change nothing at inference, as data with the reason for each.

A field that `PeftConfig` does not use is accepted if it stands here, or if it says nothing: null, false, zero or empty.
Everything else may change what the adapter computes, and is refused by name.
"""

from collections.abc import Mapping
from typing import Any

NEUTRAL: Mapping[str, tuple[str, ...]] = {
    "what the adapter was made for, and with": (
        "auto_mapping",
        "base_model_class",
        "base_model_name_or_path",
        "inference_mode",
        "model_type",
        "parent_library",
        "peft_type",  # read and checked: it must be LORA
        "peft_version",  # read where the orientation of a 3-D parameter depends on it
        "revision",
        "task_type",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
    ),
    "settings of training, which leave no trace in the arithmetic": (
        "ensure_weight_tying",  # read where `modules_to_save` or LoRA names head or embedding
        "eva_config",  # how A was initialised
        "lora_dropout",
        "lora_dtype",  # ms-swift: the dtype that A and B were trained in
        "lorap_emb_lr",  # ms-swift: a learning rate
        "lorap_lr_ratio",
        "loraplus_lr_embedding",
        "loraplus_lr_ratio",
    ),
    "how PEFT runs a layer, and not what it computes": (
        "megatron_core",  # the name of a module to import; `megatron_config` decides whether it is used
        "qalora_group_size",  # without effect unless `use_qalora`, which is refused
        "runtime_config",
    ),
}
"""Reason -> the fields that are accepted for it, whatever they hold."""

REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA is not supported",
    "lora_bias": "biases of LoRA matrices are not supported",
    "fan_in_fan_out": "weights stored transposed (fan_in_fan_out) are not supported",
    "layer_replication": "replicated layers are not supported",
    "alora_invocation_tokens": "activated LoRA is not supported",
    "use_qalora": "QA-LoRA pools its inputs and is not supported",
}
"""Fields that are understood and not supported -> what users are told."""

PLAIN_INITS = (True, False, None, "", "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights alone; PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and MiCA are refused."""

NEUTRAL_NAMES = frozenset(name for names in NEUTRAL.values() for name in names)


def is_neutral(name: str, value: Any) -> bool:
    """Whether a field changes nothing at inference.

    Args:
      name: the field. One that begins with an underscore is a note of some tool.
      value: what it holds.
    """
    return name in NEUTRAL_NAMES or name.startswith("_") or says_nothing(value)


def says_nothing(value: Any) -> bool:
    """Whether a value is null, false, zero or empty, or holds nothing but nulls and empty values.

    A zero inside a list does say something: it may be the index of a layer or a token.
    """
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return all(item is None or item is False or item in ("", {}, []) or _is_empty_container(item) for item in inner)
    return value is None or value == 0 or (isinstance(value, str) and not value.strip())


def _is_empty_container(value: Any) -> bool:
    return isinstance(value, dict | list) and says_nothing(value)
