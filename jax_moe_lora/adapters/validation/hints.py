"""What loading accepts and a user may not have meant: parts of a config that do nothing, a note that is missing."""

from collections.abc import Iterator

from jax_moe_lora.adapters.formats.adapter_file import AdapterFile
from jax_moe_lora.adapters.formats.config_fields import unsloth_field
from jax_moe_lora.adapters.formats.peft import WRAPPERS
from jax_moe_lora.adapters.formats.targets import ends
from jax_moe_lora.adapters.validation.finding import Finding


def hints(file: AdapterFile) -> list[Finding]:
    """Warnings of a file whose weights have been found.

    Patterns and targets that match none of them, an alpha of 0, and an order of B's columns that nothing vouches for.
    """
    return [Finding("warning", str(file.config.file), *parts) for parts in _hints(file)]


def _hints(file: AdapterFile) -> Iterator[tuple[str, str, str, str]]:
    """(key, expected, found, message)"""
    config, present = file.config, file.present
    for field, table in (("rank_pattern", config.rank_table), ("alpha_pattern", config.alpha_table)):
        used = {index for name in present for index in table.matching(name)} if table.patterns else set()
        for index, pattern in enumerate(table.patterns):
            if index not in used:
                message = f"{config.file}: {field} has {pattern!r}, which matches no projection of the adapter."
                yield f"{field}.{pattern}", "a projection of the adapter", "no match", message
    listed, called = [] if isinstance(config.target_modules, str) else config.target_modules, ends(present)
    for target in listed:
        if target not in called:
            message = f"{config.file}: target_modules names {target!r}, which no projection of the adapter is called."
            yield f"target_modules.{target}", "a projection of the adapter", "no match", message
    if config.says_scale and config.alpha == 0:
        message = f"{config.file}: lora_alpha is 0, so that the adapter changes nothing where no alpha_pattern holds."
        yield "lora_alpha", "another number", "0", message
    if file.layout.startswith(WRAPPERS.name) and file.b_layout is None and "lora_B_layout" not in config.malformed:
        yield from _unmarked(file)


def _unmarked(file: AdapterFile) -> Iterator[tuple[str, str, str, str]]:
    """A file of Unsloth with 3-D experts that does not say the order of B's columns."""
    config = file.config
    field = None if config.b_layout or config.b_layouts else unsloth_field(config.raw)
    if field is not None:
        message = (
            f"{config.file}: {field} points to Unsloth, and lora_B_layout is missing: before 2026-09-17 Unsloth stored "
            "B of 3-D experts grouped by expert. It is read as rank_major; for an older file give "
            "lora_b_layout='grouped_by_expert' (--lora-b-layout)."
        )
        yield "lora_B_layout", "rank_major or grouped_by_expert", "nothing", message
