"""Mistral Small 4 (`mistral4`, or within `mistral3`): latent attention whose queries grow with their position."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jax_moe_lora.adapters.formats.names import WRAPPED
from jax_moe_lora.errors import ConfigError
from jax_moe_lora.models.decoder_config import open_fields, read_model, read_norm
from jax_moe_lora.models.families.deepseek import layer_specs, read_mla
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.routed_experts import read_experts, read_first_dense, read_groups, read_routed
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.specs.mla import MLA
from jax_moe_lora.models.specs.model import ModelConfig

# What the class has for a config that says nothing of positions.
DEFAULT_ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 128.0,
    "original_max_position_embeddings": 8192,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
OWN = ("llama_4_scaling_beta", "partial_rotary_factor", "max_position_embeddings")


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    positions = raw.get("rope_parameters") or DEFAULT_ROPE
    if raw.get("rope_scaling") or not isinstance(positions, Mapping):
        message = f"{source}: rope_parameters is {positions!r} beside rope_scaling; rope_parameters alone was expected."
        raise ConfigError(message, file=source, key="rope_parameters")
    plain = {name: value for name, value in positions.items() if name not in OWN}
    fields = open_fields({**raw, "rope_parameters": plain}, source)
    norm, attention = read_norm(fields, 1e-6), _attention(fields, Fields(positions, f"{source}, rope"))
    moe = read_experts(
        fields,
        fields.flag("norm_topk_prob", True),
        scaling=fields.positive("routed_scaling_factor", 1.0),
        group_score="top2_sum",
        **read_groups(fields, (1, 1)),
    )
    layers = layer_specs(fields, attention, read_routed(fields, moe), norm, read_first_dense(fields, 0))
    return read_model(fields, generation, layers, model_type="mistral4")


def _attention(fields: Fields, positions: Fields) -> MLA:
    """Latent attention with the factor on queries that the class always has."""
    attention = read_mla(fields)
    rope = attention.rope
    if rope.kind != "yarn" or rope.original_max_positions is None:
        raise fields.error(f"rope_type is {rope.kind!r}, the class works with 'yarn' alone", "rope_parameters")
    # Only the rotary embedding reads head_dim: the part of it that turns must be qk_rope_head_dim.
    width = attention.nope_dim + attention.rope_dim
    share = positions.number("partial_rotary_factor", attention.rope_dim / width)
    if int(fields.size("head_dim", width) * share) != attention.rope_dim:
        problem = f"head_dim times partial_rotary_factor {share} is not qk_rope_head_dim {attention.rope_dim}"
        raise fields.error(problem, "head_dim")
    return replace(attention, query_growth=(positions.number("llama_4_scaling_beta"), rope.original_max_positions))


FAMILY = Family(
    "mistral4",
    read_config,
    wrappers=("mistral3",),
    prefixes=WRAPPED,
    unused={
        r"(model\.)?vision_tower\..*": "the vision tower",
        r"(model\.)?multi_modal_projector\..*": "the vision tower's projector",
    },
)
