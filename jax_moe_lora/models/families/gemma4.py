"""Gemma 4, the model with experts (26B-A4B): its text part, alone (`gemma4_text`) or in its wrapper (`gemma4`)."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.models.decoder_config import open_fields, read_layers, read_model, read_moe, read_norm
from jax_moe_lora.models.families.family import Family
from jax_moe_lora.models.families.gemma4_attention import read_attention
from jax_moe_lora.models.neutral_fields import QK_NORM, QKV_BIAS, Values
from jax_moe_lora.models.specs.gemma4 import Gemma4Layer
from jax_moe_lora.models.specs.mlp import DenseMLP, RoutedMLP
from jax_moe_lora.models.specs.model import ModelConfig

# What the class in transformers does whatever its config says.
NEUTRAL: Values = dict.fromkeys(QK_NORM, (True,)) | dict.fromkeys(QKV_BIAS, (False,)) | {"norm_topk_prob": (True,)}
# The class reads the first ones under other names, and the last ones for inputs and keys that are refused here.
ANY_VALUE = (
    *("hidden_act", "query_pre_attn_scalar", "rope_scaling", "rope_theta", "sliding_window_pattern"),
    *("use_double_wide_mlp", "vocab_size_per_layer_input"),
)


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = open_fields(raw, source, NEUTRAL, ANY_VALUE)
    if not fields.flag("enable_moe_block", False):
        raise fields.error("enable_moe_block is false: this is a dense model of Gemma 4", "enable_moe_block")
    if width := fields.count("hidden_size_per_layer_input", 256):
        problem = f"hidden_size_per_layer_input is {width} (256 where it is missing): inputs by layer are not supported"
        raise fields.error(problem, "hidden_size_per_layer_input")
    if shared := fields.count("num_kv_shared_layers", 0):
        problem = f"num_kv_shared_layers is {shared}: keys and values of other layers are not supported"
        raise fields.error(problem, "num_kv_shared_layers")
    norm = read_norm(fields, 1e-6, wide=True)
    if fields.get("hidden_activation") is not None:
        fields.choice("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"})
    moe = read_moe(fields, "moe_intermediate_size", True, top_k_name="top_k_experts", activation="gelu_tanh")
    dense, routed = DenseMLP(fields.size("intermediate_size"), "gelu_tanh"), RoutedMLP(moe)
    attention = read_attention(fields, read_layers(fields), norm)
    return read_model(
        fields,
        generation,
        [Gemma4Layer(of_layer, dense, routed, norm) for of_layer in attention],
        model_type="gemma4_text",
        embedding_scale=moe.hidden_size**0.5,
        logit_softcap=fields.optional_positive("final_logit_softcapping"),
        tie_embeddings=fields.flag("tie_word_embeddings", True),
    )


FAMILY = Family(
    "gemma4_text",
    read_config,
    wrappers=("gemma4",),
    paths={"router": ("router.proj.weight",)},
    experts_path="experts",
    prefixes=("model.language_model.", "language_model.model."),
    renames={r"model\.language_model\.model\.": "model."},  # as transformers 5.10 to 5.23 may have saved them
    unused={
        r"model\.(vision_tower|embed_vision)\..*": "the vision tower",
        r"model\.(audio_tower|embed_audio)\..*": "the audio tower",
    },
    refuses="inputs by layer, keys and values that layers share, models without experts",
)
