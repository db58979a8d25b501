"""Qwen3-MoE: its `config.json`, the names of its tensors, and the names that adapters use."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.adapters.formats.names import AdapterNames
from jax_moe_lora.config import ModelConfig, MoEConfig
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.rope_config import read_rope

MODEL_TYPE = "qwen3_moe"
MOST = 65_536  # layers and experts: a hostile config must not size the lists that are made before a file is opened

ADAPTER_NAMES = AdapterNames(
    dense={
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.o_proj": "o",
        "mlp.gate": "router",
        "mlp.gate_proj": "mlp_gate",
        "mlp.up_proj": "mlp_up",
        "mlp.down_proj": "mlp_down",
    },
    experts={"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    experts_path="mlp.experts",
)

# Fields that change nothing at inference, or that only repeat what the others say.
HARMLESS = frozenset(
    {
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "max_window_layers",
        "model_type",
        "name_or_path",
        "_name_or_path",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "unsloth_version",
        "_attn_implementation",
        "experts_implementation",
        "sliding_window",
    }
)


def read_config(raw: Mapping[str, Any], generation: Mapping[str, Any] | None, source: str) -> ModelConfig:
    """The model's config from `config.json`, as published on the hub or as transformers 5 writes it.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or not understood, by name.
    """
    fields = Fields(raw, source, HARMLESS)
    fields.refuse_quantised()
    fields.expect("use_sliding_window", (None, False), "sliding-window attention is not supported")
    layers = fields.size("num_hidden_layers")
    if layers > MOST:
        raise fields.error(f"num_hidden_layers is {layers}, at most {MOST} are supported")
    fields.expect_all("layer_types", "full_attention", layers)
    hidden = fields.size("hidden_size")
    heads, kv_heads, head_dim = _read_heads(fields, hidden)
    experts, top_k = _read_experts(fields)
    eps = fields.number("rms_norm_eps", 1e-6)
    if eps <= 0:
        raise fields.error(f"rms_norm_eps is {eps}, a positive number was expected")
    sparse_step = fields.size("decoder_sparse_step", 1)
    dense = fields.indices("mlp_only_layers", layers)
    max_positions = fields.size("max_position_embeddings")
    config = ModelConfig(
        model_type=MODEL_TYPE,
        vocab_size=fields.size("vocab_size"),
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=fields.size("intermediate_size"),
        moe=MoEConfig(
            hidden_size=hidden,
            expert_width=fields.size("moe_intermediate_size"),
            num_experts=experts,
            top_k=top_k,
            router="softmax_topk",
            renormalize=fields.flag("norm_topk_prob", False),
            activation=fields.choice("hidden_act", {"silu": "silu", "swish": "silu"}),
        ),
        moe_layers=tuple(layer not in dense and (layer + 1) % sparse_step == 0 for layer in range(layers)),
        rope=read_rope(fields, max_positions),
        rms_eps=eps,
        qk_norm=True,
        attention_bias=fields.flag("attention_bias", False),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_positions=max_positions,
        eos_token_ids=fields.token_ids("eos_token_id", generation),
    )
    fields.refuse_unknown()
    return config


def _read_heads(fields: Fields, hidden: int) -> tuple[int, int, int]:
    """(query heads, key/value heads, width of a head)."""
    heads, kv_heads = fields.size("num_attention_heads"), fields.size("num_key_value_heads")
    if heads % kv_heads:
        raise fields.error(f"num_attention_heads is {heads}, no multiple of num_key_value_heads {kv_heads}")
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.error(f"head_dim is missing, and hidden_size {hidden} is no multiple of {heads} heads")
    head_dim = fields.size("head_dim", hidden // heads)
    if head_dim % 2:
        raise fields.error(f"head_dim is {head_dim}, an even one was expected: rotary embedding turns pairs")
    return heads, kv_heads, head_dim


def _read_experts(fields: Fields) -> tuple[int, int]:
    """(experts, experts per token); the hub and transformers 5 name the first differently."""
    hub, local = fields.optional_size("num_experts"), fields.optional_size("num_local_experts")
    if hub and local and hub != local:
        raise fields.error(f"num_experts is {hub}, but num_local_experts is {local}")
    experts = fields.size("num_experts", local)
    if experts > MOST:
        raise fields.error(f"num_experts is {experts}, at most {MOST} are supported")
    top_k = fields.size("num_experts_per_tok")
    if top_k > experts:
        raise fields.error(f"num_experts_per_tok is {top_k}, more than the {experts} experts")
    return experts, top_k


def tensor_names(config: ModelConfig) -> dict[str, str | list[str]]:
    """Path in the parameter tree -> checkpoint tensor, or one tensor an expert where the leaf stacks them."""
    names: dict[str, str | list[str]] = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    if not config.tie_embeddings:
        names["head"] = "lm_head.weight"
    for layer, routed in enumerate(config.moe_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        names[f"{ours}.attention_norm"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}.mlp_norm"] = f"{theirs}.post_attention_layernorm.weight"
        for module in "qkvo":
            names[f"{ours}.attention.{module}"] = f"{theirs}.self_attn.{module}_proj.weight"
            if config.attention_bias:
                names[f"{ours}.attention.{module}_bias"] = f"{theirs}.self_attn.{module}_proj.bias"
        for module in "qk":
            names[f"{ours}.attention.{module}_norm"] = f"{theirs}.self_attn.{module}_norm.weight"
        if routed:
            names[f"{ours}.mlp.router"] = f"{theirs}.mlp.gate.weight"
        for module in ("gate", "up", "down"):
            if routed:
                experts = [f"{theirs}.mlp.experts.{e}.{module}_proj.weight" for e in range(config.moe.num_experts)]
                names[f"{ours}.mlp.experts.{module}"] = experts
            else:
                names[f"{ours}.mlp.{module}"] = f"{theirs}.mlp.{module}_proj.weight"
    return names


def unused_names(config: ModelConfig) -> frozenset[str]:
    """Tensors that may stand in a checkpoint and are not read: a tied head, saved all the same."""
    return frozenset({"lm_head.weight"} if config.tie_embeddings else ())
