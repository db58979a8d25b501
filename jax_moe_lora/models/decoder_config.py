"""The fields of `config.json` that the families share, in the spellings of the hub and of transformers 5."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jax_moe_lora.config import MoEConfig
from jax_moe_lora.models.fields import QUANTISED, Fields
from jax_moe_lora.models.neutral_fields import Values
from jax_moe_lora.models.quantised.methods import read_quantisation
from jax_moe_lora.models.rope_config import read_rope
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.model import Layer, ModelConfig
from jax_moe_lora.models.specs.parameter import Norm
from pallas_kernels.constants import Activation

MOST = 65_536  # layers and experts: a hostile config must not size the lists that are made before a file is opened


def open_fields(
    raw: Mapping[str, Any], source: str, neutral: Values | None = None, any_value: tuple[str, ...] = ()
) -> Fields:
    """The fields of a config. How its checkpoint is quantised is read when everything else is (`read_model`).

    Args:
      raw: the config.
      source: what errors call the file.
      neutral: the family's own neutral fields, as in `neutral_fields.ONE_VALUE`.
      any_value: the family's own fields that are passed over whatever they say.
    """
    fields = Fields(raw, source, neutral, any_value)
    for name in QUANTISED:
        fields.get(name)
    return fields


def read_model(
    fields: Fields,
    generation: Mapping[str, Any] | None,
    layers: Sequence[Layer],
    **others: Any,
) -> ModelConfig:
    """A family's config: what all families have is read here.

    Args:
      fields: the config's.
      generation: `generation_config.json`.
      layers: what the family made of its fields.
      others: further fields of `ModelConfig`.

    Raises:
      ConfigError: a field that is missing, malformed, not supported, or read by nobody, by name; so is a
        quantisation.
    """
    common: dict[str, Any] = {
        "norm": layers[0].norm,
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
    }
    config = ModelConfig(
        vocab_size=fields.size("vocab_size"),
        hidden_size=fields.size("hidden_size"),
        layers=tuple(layers),
        max_positions=fields.size("max_position_embeddings"),
        eos_token_ids=fields.token_ids("eos_token_id", generation),
        **(common | others),
    )
    fields.refuse_unknown()
    return replace(config, quantisation=read_quantisation(fields))


def read_gqa(
    fields: Fields, default_theta: float = 10_000.0, *, rotary_factor: float | None = None, **others: Any
) -> GQA:
    """Grouped-query attention: its heads and its rotary embedding.

    Args:
      fields: the config's.
      default_theta: what the family's class has for a config that says none.
      rotary_factor: likewise, the part of a head that is turned; None for a family that turns all of it.
      others: further fields of `GQA`.

    Raises:
      ConfigError: a field that is missing, malformed or not supported, by name.
    """
    heads, kv_heads, head_dim = read_heads(fields)
    rope = read_rope(
        fields,
        fields.size("max_position_embeddings"),
        default_theta,
        head_dim=None if rotary_factor is None else head_dim,
        default_factor=rotary_factor or 1.0,
    )
    return GQA(heads, kv_heads, head_dim, **({"rope": rope} | others))


def read_norm(fields: Fields, default_eps: float, **others: Any) -> Norm:
    """The norms: `rms_norm_eps`.

    Args:
      fields: the config's.
      default_eps: what the family's class has for a config that says none.
      others: further fields of `Norm`.
    """
    return Norm(fields.positive("rms_norm_eps", default_eps), **others)


def read_moe(
    fields: Fields,
    expert_width: str,
    renormalize: bool,
    experts_names: tuple[str, ...] = ("num_experts", "num_local_experts"),
    top_k_name: str = "num_experts_per_tok",
    **others: Any,
) -> MoEConfig:
    """The routed experts, with a softmax-then-top-k router where `others` name no other.

    Args:
      fields: the config's.
      expert_width: the field that holds F.
      renormalize: as in `MoEConfig`.
      experts_names: the fields that may hold E.
      top_k_name: the field that holds K.
      others: further fields of `MoEConfig`.
    """
    if "activation" not in others:
        others["activation"] = read_activation(fields)
    experts, top_k = _read_experts(fields, experts_names, top_k_name)
    return MoEConfig(
        hidden_size=fields.size("hidden_size"),
        expert_width=fields.size(expert_width),
        num_experts=experts,
        top_k=top_k,
        renormalize=renormalize,
        **others,
    )


def read_activation(fields: Fields) -> Activation:
    """`hidden_act`, of the gated unit."""
    return fields.choice("hidden_act", {"silu": "silu", "swish": "silu"})


def read_layers(fields: Fields) -> int:
    """L, within bounds that a list of this length cannot hurt."""
    layers = fields.size("num_hidden_layers")
    if layers > MOST:
        raise fields.error(f"num_hidden_layers is {layers}, at most {MOST} are supported")
    return layers


def read_layer_types(fields: Fields, pattern: Sequence[str]) -> tuple[str, ...]:
    """`layer_types`, the kind of attention of each layer.

    Args:
      fields: the config's.
      pattern: the kinds that the family has, in the order in which layers take them where a config says nothing.

    Raises:
      ConfigError: another number of layers, or another kind, by name.
    """
    count = read_layers(fields)
    types = fields.get("layer_types")
    if types is None:
        return tuple(pattern[layer % len(pattern)] for layer in range(count))
    known = dict.fromkeys(pattern)
    if not isinstance(types, list) or len(types) != count or any(kind not in known for kind in types):
        raise fields.error(f"layer_types is {types!r}, {count} of {', '.join(known)} were expected", "layer_types")
    return tuple(types)


def read_sparse_layers(fields: Fields) -> tuple[bool, ...]:
    """Which layers are routed, in the families of Qwen: each `decoder_sparse_step`-th, but for `mlp_only_layers`."""
    layers = read_layers(fields)
    step, dense = fields.size("decoder_sparse_step", 1), fields.indices("mlp_only_layers", layers)
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in range(layers))


def read_heads(fields: Fields) -> tuple[int, int, int]:
    """(query heads, key/value heads, width of a head)."""
    hidden = fields.size("hidden_size")
    heads, kv_heads = fields.size("num_attention_heads"), fields.size("num_key_value_heads")
    if heads % kv_heads:
        raise fields.error(f"num_attention_heads is {heads}, no multiple of num_key_value_heads {kv_heads}")
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.error(f"head_dim is missing, and hidden_size {hidden} is no multiple of {heads} heads")
    head_dim = fields.size("head_dim", hidden // heads)
    if head_dim % 2:
        raise fields.error(f"head_dim is {head_dim}, an even one was expected: rotary embedding turns pairs")
    return heads, kv_heads, head_dim


def _read_experts(fields: Fields, names: tuple[str, ...], top_k_name: str) -> tuple[int, int]:
    """(experts, experts per token); the first may have several names, by family and by version of transformers."""
    sizes = {name: size for name in names if (size := fields.optional_size(name))}
    if len({*sizes.values()}) > 1:
        (name, size), (other, another) = list(sizes.items())[:2]
        raise fields.error(f"{name} is {size}, but {other} is {another}")
    name = next(iter(sizes), names[0])
    experts = fields.size(name)
    if experts > MOST:
        raise fields.error(f"{name} is {experts}, at most {MOST} are supported")
    top_k = fields.size(top_k_name)
    if top_k > experts:
        raise fields.error(f"{top_k_name} is {top_k}, more than the {experts} experts")
    return experts, top_k
