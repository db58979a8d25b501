"""An adapter's config before there are files: whether what it asks for can be served."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set
from enum import Enum
from typing import Any

from jax_moe_lora.adapters.formats.config_reading import peft_config_of
from jax_moe_lora.adapters.formats.names import AdapterNames, with_prefix
from jax_moe_lora.adapters.formats.peft_config import PeftConfig
from jax_moe_lora.adapters.formats.problems import Problems
from jax_moe_lora.adapters.formats.targets import (
    dense_modules,
    ends,
    expert_modules,
    joined_modules,
    outer_modules,
    parameters,
)
from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.adapters.validation.finding import Finding, finding_of
from jax_moe_lora.errors import InputError


def fields_of(config: Any) -> tuple[dict[str, Any], str, bool]:
    """The fields of a config, what errors call it, and whether it says ranks and scales.

    Args:
      config: a `LoraConfig` of PEFT or another object with `to_dict` or fields, a dictionary, or target modules.

    Raises:
      InputError: something else.
    """
    if isinstance(config, Mapping):
        return _plain(config), "the config", True
    if isinstance(config, Sequence | Set) and not isinstance(config, str | bytes):
        # Rank and scale are not the question here, so any do.
        return {"target_modules": _plain(config), "r": 1, "lora_alpha": 1}, "target_modules", False
    name = type(config).__name__
    if callable(to_dict := getattr(config, "to_dict", None)):
        return _plain(to_dict()), name, True
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return _plain(dataclasses.asdict(config)), name, True
    raise InputError(f"config is of type {name}; give a LoraConfig, its fields as a dictionary, or target modules.")


def _plain(value: Any) -> Any:
    """A value as JSON would have it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted(map(_plain, value), key=str)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def examine_config(
    fields: Mapping[str, Any],
    source: str,
    says_ranks: bool,
    sites: Mapping[str, Site],
    names: AdapterNames,
    max_rank: int,
) -> list[Finding]:
    """Everything that is wrong with a config for a model.

    Args:
      fields: as in `adapter_config.json`.
      source: what findings call the config.
      says_ranks: whether its ranks are the user's.
      sites: the model's projections.
      names: where they stand in adapter files.
      max_rank: the largest rank that the bank takes.

    Returns:
      The findings, errors first.
    """
    problems = Problems(keep=True)
    config = peft_config_of(fields, source, problems)
    if not config.says_targets:
        return [finding_of(error) for error in problems.found]
    modules = [*dense_modules(names, sites), *expert_modules(names, sites), *outer_modules(sites)]
    modules += joined_modules(names, sites)
    modules, with_weights = (
        [with_prefix(name, names.prefixes[0]) for name in some] for some in (modules, parameters(names, sites))
    )
    targeted = [name for name in modules if config.targets_module(name)]
    targeted += [name for name in with_weights if config.targets_parameter(name)]
    _check_parameters(config, ends(with_weights), problems)
    with problems:
        if not targeted and not problems.found:
            expected = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
            why = f"its targets match no projection of the model, which has {expected}"
            raise config.error(why, "target_modules", "no match", expected)
    if says_ranks and config.says_ranks:
        _check_ranks(config, targeted, max_rank, problems)
    _check_tokens(config, sites, max_rank, problems)
    return [finding_of(error) for error in problems.found] + [
        Finding("warning", source, *parts) for parts in (*_whole(config, sites), *_unmatched(config, targeted))
    ]


def _check_parameters(config: PeftConfig, possible: set[str], problems: Problems) -> None:
    for target in config.target_parameters:
        with problems:
            if target not in possible:
                expected = "a parameter of the model, such as mlp.experts.gate_up_proj"
                why = f"target_parameters names {target!r}, which is no parameter of the model"
                raise config.error(why, f"target_parameters.{target}", "no match", expected)


def _check_ranks(config: PeftConfig, targeted: Sequence[str], max_rank: int, problems: Problems) -> None:
    ranks = {config.rank_and_scale(name)[0]: name for name in reversed(targeted)}
    for rank, name in sorted(ranks.items()):
        with problems:
            if rank > max_rank:
                why = f"{name} has rank {rank}; the bank takes at most {max_rank} (raise max_rank)"
                raise config.error(why, "r", f"rank {rank}", f"at most {max_rank}")


def _check_tokens(config: PeftConfig, sites: Mapping[str, Site], max_rank: int, problems: Problems) -> None:
    for path, ids in config.token_ids.items():
        field, vocabulary = f"trainable_token_indices.{path}", sites["embedding"].in_width
        with problems:
            if max(ids) >= vocabulary:
                why = f"trainable_token_indices has {max(ids)}, and the model has the tokens 0 to {vocabulary - 1}"
                raise config.error(why, field, str(max(ids)), f"ids below {vocabulary}")
        with problems:
            if len(ids) > max_rank:
                why = f"{path} has {len(ids)} trained tokens, each of which takes a rank"
                why += f"; the bank takes at most {max_rank} (raise max_rank)"
                raise config.error(why, field, f"{len(ids)} tokens", f"at most {max_rank}")


def _whole(config: PeftConfig, sites: Mapping[str, Site]) -> Iterator[tuple[str, str, str, str]]:
    """(key, expected, found, message)"""
    for path in sorted(config.saved_modules):
        values = f"{sites['embedding'].in_width} * {sites['embedding'].out_width} values"
        message = f"{config.file}: modules_to_save makes {path} a whole matrix of {values}, which is served by a model "
        message += "that is loaded with max_replacements; LoRA on it (target_modules) takes less."
        yield f"modules_to_save.{path}", "no whole matrix", values, message


def _unmatched(config: PeftConfig, targeted: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    """(key, expected, found, message)"""
    called = ends([*targeted, *config.saved_modules])
    listed = [] if isinstance(config.target_modules, str) else config.target_modules
    for target in listed if targeted else ():
        if target not in called:
            message = f"{config.file}: target_modules names {target!r}, which no projection of the model is called."
            yield f"target_modules.{target}", "a projection of the model", "no match", message
    for field, table in (("rank_pattern", config.rank_table), ("alpha_pattern", config.alpha_table)):
        used = {index for name in targeted for index in table.matching(name)} if table.patterns else set()
        for index, pattern in enumerate(table.patterns):
            if index not in used:
                message = f"{config.file}: {field} has {pattern!r}, which matches nothing that the config targets."
                yield f"{field}.{pattern}", "a projection that is targeted", "no match", message
