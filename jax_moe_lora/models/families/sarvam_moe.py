"""Sarvam: the model of GLM-4.5 with whole heads turned, whose checkpoints have one projection for q, k and v."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_activation, read_gqa, read_model, read_norm
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.routed_experts import EXPERTS_NAMES, SIGMOID, read_first_dense, read_sigmoid_routed
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import Values
from jax_moe_lora.models.specs.mlp import DenseMLP
from jax_moe_lora.models.specs.model import LayerSpec, ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = {
    **SIGMOID,
    "moe_router_enable_expert_bias": (True,),
    "score_function": ("sigmoid",),
    "use_bias": (False,),
}
# No layer has a window, layers that predict further tokens are not run, and dropout is training's.
ANY_VALUE = ("max_window_layers", "num_mtp_layers", "num_nextn_predict_layers", "output_dropout")
# The class' own, whatever the width of the model.
HEAD_DIM = 64


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields({"head_dim": HEAD_DIM, **raw}, source, NEUTRAL, ANY_VALUE)
    return read_decoder(fields, generation, theta=8e6, scaling=2.5, model_type="sarvam_moe")


def read_decoder(
    fields: Fields, generation: Mapping[str, Any] | None, *, theta: float, scaling: float, model_type: str
) -> ModelConfig:
    """The model of a family whose checkpoints have these names.

    Args:
      fields: the config's.
      generation: `generation_config.json`, or None.
      theta: base of the rotary embedding, where the config says none.
      scaling: factor on the experts' weights, likewise.
      model_type: the family's.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    norm = read_norm(fields, 1e-6)
    attention = read_gqa(
        fields,
        theta,
        rotary_factor=1.0,
        norm=norm,
        qk_norm="head" if fields.flag("use_qk_norm", True) else None,
        biases="qkv" if fields.flag(_spelling(fields, "use_qkv_bias", "attention_bias"), False) else "",
    )
    shared_name = _spelling(fields, "num_shared_experts", "n_shared_experts")
    routed = read_sigmoid_routed(fields, EXPERTS_NAMES, shared_name, renormalize=True, scaling=scaling)
    dense = DenseMLP(fields.size("intermediate_size"), read_activation(fields))
    layers = [LayerSpec(attention, routed if here else dense, norm) for here in read_first_dense(fields, 1)]
    return read_model(fields, generation, layers, model_type=model_type)


def _spelling(fields: Fields, published: str, own: str) -> str:
    """Which of the two names of a field a config has: the published one, or that of transformers."""
    one, other = fields.get(published), fields.get(own)
    if one is not None and other is not None and one != other:
        raise fields.error(f"{published} is {one!r}, but {own} is {other!r}; give one of them", published)
    return own if one is None else published


FAMILY = Family(
    "sarvam_moe",
    read_config,
    paths={
        "o": ("self_attn.o_proj.weight", "attention.dense.weight"),
        "q_norm": ("self_attn.q_norm.weight", "attention.query_layernorm.weight"),
        "k_norm": ("self_attn.k_norm.weight", "attention.key_layernorm.weight"),
        "choice_bias": ("mlp.gate.e_score_correction_bias", "mlp.gate.expert_bias"),
    },
    joined={
        "attention.query_key_value.weight": ("q", "k", "v"),
        "attention.query_key_value.bias": ("q_bias", "k_bias", "v_bias"),
    },
    renames={r"model\.word_embeddings\.": "model.embed_tokens."},
    prediction_layers=True,
    refuses="a quantised tensor for q, k and v",
)
