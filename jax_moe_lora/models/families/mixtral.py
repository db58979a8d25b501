"""Mixtral: its `config.json`, and the names that its projections have in files."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.models.decoder_config import open_fields, read_decoder, read_layers, read_moe
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.names import ATTENTION, ROUTER
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values

MODEL_TYPE = "mixtral"
# Checkpoints, and adapters from transformers 4, say block_sparse_moe; the modules of transformers 5 are called mlp.
ADAPTER_NAMES = AdapterNames(
    dense=ATTENTION | ROUTER | {"block_sparse_moe.gate": "router"},
    experts={"w1": "gate", "w3": "up", "w2": "down"},
    experts_path="mlp.experts",
    per_expert_path="block_sparse_moe.experts",
)

# What the class in transformers does whatever its config says.
NEUTRAL: Values = {"norm_topk_prob": (True,)} | dict.fromkeys((*QK_NORM, *QKV_BIAS), (False,))


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL)
    _refuse_window(fields)
    return read_decoder(
        fields,
        generation,
        model_type=MODEL_TYPE,
        moe=read_moe(fields, "intermediate_size", renormalize=True),
        moe_layers=(True,) * read_layers(fields),
        mlp_width=0,
        qk_norm=None,
        default_eps=1e-5,
        default_theta=1e6,
    )


def _refuse_window(fields: Fields) -> None:
    """A window that no position lies outside of changes nothing."""
    window, positions = fields.optional_size("sliding_window"), fields.size("max_position_embeddings")
    if window is not None and window < positions:
        raise fields.error(
            f"sliding_window is {window}, less than the {positions} of max_position_embeddings: "
            "sliding-window attention is not supported"
        )
