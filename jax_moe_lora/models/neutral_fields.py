"""Fields of `config.json` that change nothing at inference, as data with the reason for each.

A field that no reader asks for is accepted if it stands here with the value that it has, or if it is empty. Everything
else may change what the model computes, and is refused by name.
"""

import re
from collections.abc import Mapping
from typing import Any

Values = Mapping[str, tuple[Any, ...]]

ANY_VALUE: Mapping[str, tuple[str, ...]] = {
    "names of the model, of its class and of what is beside it": (
        "architectures",
        "auto_map",
        "model_type",
        "name_or_path",
        "tokenizer_class",
        "transformers_version",
        "transformers.js_config",
    ),
    "how weights are stored or attention is run: the caller chooses both here": (
        "dtype",
        "torch_dtype",
        "use_bfloat16",
        "use_cache",
        "attn_implementation",
        "experts_implementation",
        "chunk_size_feed_forward",
    ),
    "ids that the tokenizer and the generation loop use": (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
    ),
    "what else transformers returns": (
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "return_dict",
        "return_dict_in_generate",
    ),
    "training alone: initialisation, dropout, noise and losses": (
        "attention_dropout",
        "attn_dropout",
        "aux_loss_alpha",
        "embd_pdrop",
        "embedding_dropout",
        "ep_size",
        "gradient_checkpointing",
        "hidden_dropout",
        "initializer_range",
        "resid_pdrop",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "router_z_loss_coef",
        "seq_aux",
    ),
    "heads for classification, which a decoder does not have": (
        "finetuning_task",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "task_specific_params",
    ),
    "defaults of generation, which older versions of transformers wrote into this file": (
        "bad_words_ids",
        "begin_suppress_tokens",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "prefix",
        "remove_invalid_values",
        "repetition_penalty",
        "suppress_tokens",
        "temperature",
        "tf_legacy_loss",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
    ),
    "Megatron: how training was split, fused and balanced": (
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "make_vocab_size_divisible_by",
        "masked_softmax_fusion",
        "moe_aux_loss_coeff",
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "moe_router_bias_update_rate",
        "moe_router_dtype",
        "moe_router_load_balancing_type",
        "moe_token_dispatcher_type",
        "moe_z_loss_coeff",
        "persist_layer_norm",
    ),
}
"""Reason -> fields that are passed over whatever they say."""

NOTES = ("_", "unsloth_")
"""What notes of tools begin with: `_comment`, `_attn_implementation_autoset`, `unsloth_fixed`."""

ONE_VALUE: Mapping[str, Values] = {
    "every family here is a causal decoder with rotary embeddings and without biases in its MLPs": {
        "add_bias_linear": (False,),
        "causal": (True,),
        "is_causal": (True,),
        "is_decoder": (False, True),
        "mlp_bias": (False,),
        "position_embedding_type": ("rope", "rotary"),
        "use_rope": (True,),
    },
    "rotary embeddings turn all of a head, in halves": {
        "partial_rotary_factor": (1, 1.0),
        "rope_interleaved": (False,),
        "rotary_interleaved": (False,),
        "rotary_pct": (1, 1.0),
        "rotary_percent": (1, 1.0),
    },
    "norms are RMSNorm, before attention and before the MLP": {
        "apply_layernorm_1p": (False,),
        "apply_residual_connection_post_layernorm": (False,),
        "layernorm_zero_centered_gamma": (False,),
        "norm_type": ("rms_norm", "rmsnorm", "RMSNorm"),
        "normalization": ("RMSNorm",),
    },
    "experts and MLPs are SwiGLU": {
        "gated_linear_unit": (True,),
        "swiglu": (True,),
    },
    "experts are chosen one by one, by softmax, with their weights as they are; none is full": {
        "moe_expert_capacity_factor": (),
        "moe_layer_freq": (1,),
        "moe_router_enable_expert_bias": (False,),
        "moe_router_group_topk": (1,),
        "moe_router_num_groups": (1,),
        "moe_router_score_function": ("softmax",),
        "moe_router_topk_scaling_factor": (1, 1.0),
        "n_group": (1,),
        "routed_scaling_factor": (1, 1.0),
        "scoring_func": ("softmax",),
        "topk_group": (1,),
        "topk_method": ("greedy",),
    },
    "a checkpoint that was split for training is whole here": {
        "pretraining_tp": (1,),
        "tensor_model_parallel_size": (1,),
    },
    "activations, residuals and logits are not multiplied": {
        "embedding_multiplier": (1, 1.0),
        "logit_scale": (1, 1.0),
        "logits_scaling": (1, 1.0),
        "residual_multiplier": (1, 1.0),
    },
}
"""Reason -> fields and the only values that agree with what is computed; null always does."""

SAME_AS: Mapping[str, tuple[str, ...]] = {
    "ffn_hidden_size": ("intermediate_size",),
    "kv_channels": ("head_dim",),
    "layernorm_epsilon": ("rms_norm_eps",),
    "moe_ffn_hidden_size": ("moe_intermediate_size", "intermediate_size"),
    "moe_intermediate_size": ("intermediate_size",),
    "moe_router_topk": ("num_experts_per_tok",),
    "moe_topk": ("num_experts_per_tok",),
    "n_routed_experts": ("num_experts", "num_local_experts"),
    "norm_epsilon": ("rms_norm_eps",),
    "num_layers": ("num_hidden_layers",),
    "num_moe_experts": ("num_experts", "num_local_experts"),
    "num_query_groups": ("num_key_value_heads",),
    "rotary_base": ("rope_theta",),
    "seq_length": ("max_position_embeddings",),
}
"""Names that other tools have for a field of transformers -> that field; the value must be the same."""

QK_NORM = ("use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm")
QKV_BIAS = ("qkv_bias", "add_qkv_bias", "use_qkv_bias")

_ANY_VALUE = frozenset(name for names in ANY_VALUE.values() for name in names)
_REASONS = {name: why for why, values in ONE_VALUE.items() for name in values}
_VALUES = {name: accepted for values in ONE_VALUE.values() for name, accepted in values.items()}
# A factor of zero is not "none of it": it takes away what it multiplies.
_FACTOR = re.compile(r"scal|factor|multiplier|ratio|pct|percent|theta|base|eps|alpha|beta|temperature")


def why_refused(name: str, raw: Mapping[str, Any], family: Values, any_value: frozenset[str]) -> str | None:
    """Why a field that no reader asked for may change the result; None if it does not.

    Args:
      name: the field.
      raw: all fields of the config.
      family: what the family's class does whatever its config says, as in `ONE_VALUE`; it goes first.
      any_value: the family's fields that are passed over whatever they say.

    Returns:
      The reason, as the end of a sentence that begins with the field and its value.
    """
    value = raw[name]
    if value is None or name in _ANY_VALUE or name in any_value or name.startswith(NOTES):
        return None
    if name in family or name in _VALUES:
        accepted = family[name] if name in family else _VALUES[name]
        if any(_equal(value, other) for other in accepted):
            return None
        because = "this is what the family's class does" if name in family else _REASONS[name]
        expected = " or ".join(dict.fromkeys(map(str, accepted))) or "null"
        return f"is not supported, only {expected} is: {because}"
    if fields := [field for field in SAME_AS.get(name, ()) if raw.get(field) is not None]:
        if any(_equal(value, raw[field]) for field in fields):
            return None
        return f"is not that of {fields[0]}, {raw[fields[0]]!r}, of which it is another name"
    if _is_empty(value) and not (_is_number(value) and _FACTOR.search(name)):
        return None
    return "is not understood and may change what the model computes"


def _is_empty(value: Any) -> bool:
    return value is False or value in ("", [], {}) or (_is_number(value) and value == 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _equal(value: Any, other: Any) -> bool:
    """1 is 1.0, but it is not true."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other
