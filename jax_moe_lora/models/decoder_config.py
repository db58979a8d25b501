"""The fields of `config.json` that the families share, in the spellings of the hub and of transformers 5."""

from collections.abc import Mapping
from typing import Any

from jax_moe_lora.config import ModelConfig, MoEConfig
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.neutral_fields import Values
from jax_moe_lora.models.rope_config import read_rope

MOST = 65_536  # layers and experts: a hostile config must not size the lists that are made before a file is opened


def open_fields(
    raw: Mapping[str, Any], source: str, neutral: Values | None = None, any_value: tuple[str, ...] = ()
) -> Fields:
    """The fields of a config that is not quantised.

    Args:
      raw: the config.
      source: what errors call the file.
      neutral: the family's own neutral fields, as in `neutral_fields.ONE_VALUE`.
      any_value: the family's own fields that are passed over whatever they say.

    Raises:
      ConfigError: the checkpoint is quantised.
    """
    fields = Fields(raw, source, neutral, any_value)
    fields.refuse_quantised()
    return fields


def read_decoder(
    fields: Fields,
    generation: Mapping[str, Any] | None,
    *,
    moe: MoEConfig,
    moe_layers: tuple[bool, ...],
    default_eps: float,
    default_theta: float = 10_000.0,
    **family_fields: Any,
) -> ModelConfig:
    """A family's config: what all families have is read here, `family_fields` are the other fields of `ModelConfig`.

    Args:
      generation: `generation_config.json`. default_eps, default_theta: what the family's class has for a field that a
        config leaves out.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or read by nobody, by name.
    """
    fields.expect_all("layer_types", "full_attention", len(moe_layers))
    heads, kv_heads, head_dim = _read_heads(fields, moe.hidden_size)
    max_positions = fields.size("max_position_embeddings")
    config = ModelConfig(
        vocab_size=fields.size("vocab_size"),
        num_layers=len(moe_layers),
        hidden_size=moe.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        moe=moe,
        moe_layers=moe_layers,
        rope=read_rope(fields, max_positions, default_theta),
        rms_eps=fields.positive("rms_norm_eps", default_eps),
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_positions=max_positions,
        eos_token_ids=fields.token_ids("eos_token_id", generation),
        **family_fields,
    )
    fields.refuse_unknown()
    return config


def read_moe(fields: Fields, expert_width: str, renormalize: bool) -> MoEConfig:
    """The routed layers of a softmax-then-top-k router; `expert_width`: the field that holds F."""
    experts, top_k = _read_experts(fields)
    return MoEConfig(
        hidden_size=fields.size("hidden_size"),
        expert_width=fields.size(expert_width),
        num_experts=experts,
        top_k=top_k,
        router="softmax_topk",
        renormalize=renormalize,
        activation=fields.choice("hidden_act", {"silu": "silu", "swish": "silu"}),
    )


def read_layers(fields: Fields) -> int:
    """L, within bounds that a list of this length cannot hurt."""
    layers = fields.size("num_hidden_layers")
    if layers > MOST:
        raise fields.error(f"num_hidden_layers is {layers}, at most {MOST} are supported")
    return layers


def read_sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """Which layers are routed, in the families of Qwen: each `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    layers = read_layers(fields)
    step, dense = fields.size("decoder_sparse_step", 1), fields.indices("mlp_only_layers", layers)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


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
    """(experts, experts per token); the first has two names, by family and by version of transformers."""
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
