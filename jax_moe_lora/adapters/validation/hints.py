"""Parts of a config that loading accepts, and that do nothing for this model."""

from collections.abc import Iterator

from jax_moe_lora.adapters.formats.adapter_file import AdapterFile
from jax_moe_lora.adapters.formats.peft_config import pattern_matches
from jax_moe_lora.adapters.validation.finding import Finding


def hints(file: AdapterFile) -> list[Finding]:
    """Warnings of a file whose weights have been found: patterns and targets that match none of them, an alpha of 0."""
    return [Finding("warning", str(file.config.file), *parts) for parts in _hints(file)]


def _hints(file: AdapterFile) -> Iterator[tuple[str, str, str, str]]:
    """(key, expected, found, message)"""
    config, present = file.config, file.used | file.refused
    for field, patterns in (("rank_pattern", config.rank_patterns), ("alpha_pattern", config.alpha_patterns)):
        for pattern in patterns:
            if not any(pattern_matches(pattern, name) for name in present):
                message = f"{config.file}: {field} has {pattern!r}, which matches no projection of the adapter."
                yield f"{field}.{pattern}", "a projection of the adapter", "no match", message
    for target in [] if isinstance(config.target_modules, str) else config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in present):
            message = f"{config.file}: target_modules names {target!r}, which no projection of the adapter is called."
            yield f"target_modules.{target}", "a projection of the adapter", "no match", message
    if config.says_scale and config.alpha == 0:
        message = f"{config.file}: lora_alpha is 0, so that the adapter changes nothing where no alpha_pattern holds."
        yield "lora_alpha", "another number", "0", message
