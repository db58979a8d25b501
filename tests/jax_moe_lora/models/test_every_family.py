"""Every model type of transformers with routed experts is supported, or refused with what it needs."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import pytest

from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.families.lacks import LACKS
from jax_moe_lora.models.families.registry import FAMILIES, family
from jax_moe_lora.models.families.unsupported import LAYER_SETTINGS

# Such as num_experts, n_routed_experts, moe_num_experts; not num_experts_per_tok, nor how many are shared.
NUMBER_OF_EXPERTS = re.compile(r"(moe_)?(num|n)_((local|routed)_)?experts")
# Known on the hub, by names that transformers has no class for.
NOT_OF_TRANSFORMERS = {"kimi_k2"}
SUPPORTED = {*FAMILIES, *(wrapper for one in FAMILIES.values() for wrapper in one.wrappers)}


def has_experts(config_class: type) -> bool:
    fields = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()
    return any(NUMBER_OF_EXPERTS.fullmatch(field.name) for field in fields)


def parts_of(config: Any) -> Iterator[Any]:
    """A config, and those within it."""
    from transformers import PreTrainedConfig

    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from parts_of(part)


def with_experts() -> dict[str, dict[str, Any]]:
    """Each model type with routed experts in it -> its config as transformers makes it, by its class' defaults."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    configs: dict[str, dict[str, Any]] = {}
    for model_type, config_class in CONFIG_MAPPING.items():
        try:
            config = config_class()
        except (TypeError, ValueError, AttributeError, StrictDataclassError):  # its defaults are not complete
            if has_experts(config_class):
                configs[model_type] = {"model_type": model_type}
            continue
        if any(has_experts(type(part)) for part in parts_of(config)):
            configs[model_type] = config.to_dict() | {"model_type": model_type}
    return configs


def model_types(raw: dict[str, Any]) -> list[str]:
    """Of a config, and of those within it."""
    inner = [part for part in raw.values() if isinstance(part, dict)]
    own = [raw["model_type"]] if isinstance(raw.get("model_type"), str) else []
    return own + [model_type for part in inner for model_type in model_types(part)]


def says_what_it_needs(raw: dict[str, Any]) -> bool:
    """Whether a config is refused by what it needs, or with the advice to save its text part, which is supported."""
    with pytest.raises(ConfigError) as caught:
        family(raw["model_type"], "config.json", raw)
    refused, types = str(caught.value), model_types(raw)
    needs = [f"it needs {LACKS[name]}." for name in types if name in LACKS]
    advice = [f"{name!r}, which is supported" for name in types if name in FAMILIES]
    return any(sentence in refused for sentence in (*needs, *advice))


@pytest.mark.parity
@pytest.mark.slow(30)
def test_every_model_type_with_experts_is_supported_or_refused_with_what_it_needs() -> None:
    configs = with_experts()
    assert len(configs) > 90, "the walk sees no more what has experts"
    unsaid = [name for name, raw in configs.items() if name not in SUPPORTED and not says_what_it_needs(raw)]
    assert not unsaid, f"{unsaid} need a file each in models/families, or a line in models/families/lacks.py"


@pytest.mark.parity
@pytest.mark.slow(30)
def test_what_is_said_to_lack_something_is_known_to_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert not {*LACKS} - {*CONFIG_MAPPING_NAMES} - NOT_OF_TRANSFORMERS


def test_what_is_supported_lacks_nothing() -> None:
    assert not {*LACKS} & SUPPORTED, "take their lines out of models/families/lacks.py"
    assert not {*LAYER_SETTINGS} - {*LACKS}, "take their lines out of models/families/unsupported.py"
