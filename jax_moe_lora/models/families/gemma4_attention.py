"""The attention of Gemma 4's layers, as its configs say it: with a window, or global and of other widths."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jax_moe_lora.config import RopeConfig
from jax_moe_lora.models.fields import Fields
from jax_moe_lora.models.rope_config import read_rotary_dim
from jax_moe_lora.models.specs.gemma4 import Gemma4Attention
from jax_moe_lora.models.specs.gqa import GQA
from jax_moe_lora.models.specs.parameter import Norm

SLIDING, FULL = "sliding_attention", "full_attention"
# What the class has for a config that says nothing.
_ROPE: Mapping[str, Mapping[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}
_EVERY = 6
GLOBAL = "global_"
"""What the names of modules begin with in the layers without a window, which have other widths."""


def read_attention(fields: Fields, count: int, norm: Norm) -> Sequence[Gemma4Attention]:
    """The attention of each layer.

    Args:
      fields: the config's.
      count: L.
      norm: of queries, keys and values.

    Raises:
      ConfigError: a field that is malformed or not supported, by name.
    """
    why = "attention in both directions is not supported; that of images alone ('vision') does not matter to text"
    fields.expect("use_bidirectional_attention", (None, "vision"), why)
    types = _layer_types(fields, count)
    heads = fields.size("num_attention_heads")
    widths = {SLIDING: (fields.size("num_key_value_heads", 4), fields.size("head_dim", 256))}
    alike = fields.flag("attention_k_eq_v", False)
    widths[FULL] = _global_widths(fields, types, *widths[SLIDING], alike)
    kinds = {}
    for kind, (kv_heads, head_dim) in widths.items():
        if heads % kv_heads:
            raise fields.error(f"num_attention_heads is {heads}, no multiple of the {kv_heads} of keys in {kind}")
        of_heads = GQA(
            heads,
            kv_heads,
            head_dim,
            _read_rope(fields, kind, head_dim),
            norm=norm,
            qk_norm="head",
            biases="qkvo" if fields.flag("attention_bias", False) else "",
            window=fields.size("sliding_window", 512) if kind == SLIDING else None,
            scale=1.0,
        )
        kinds[kind] = Gemma4Attention(of_heads, GLOBAL if kind == FULL else "", alike and kind == FULL)
    return [kinds[kind] for kind in types]


def _layer_types(fields: Fields, count: int) -> Sequence[str]:
    """Each layer's kind. The last one has no window, whatever the config says of it."""
    types = fields.get("layer_types")
    if types is None:
        types = [SLIDING if (layer + 1) % _EVERY else FULL for layer in range(count)]
    if not isinstance(types, list) or len(types) != count or any(kind not in (SLIDING, FULL) for kind in types):
        raise fields.error(f"layer_types is {types!r}, {count} of {SLIDING} and {FULL} were expected", "layer_types")
    return [*types[:-1], FULL]


def _global_widths(fields: Fields, types: Sequence[str], kv_heads: int, head_dim: int, alike: bool) -> tuple[int, int]:
    """(heads of keys, their width) in the layers without a window, as the hub says it or as transformers 5 does."""
    by_layer = fields.get("per_layer_config")
    global_dim, global_kv = fields.size("global_head_dim", 512), fields.optional_size("num_global_key_value_heads")
    if by_layer is None:
        return global_kv if alike and global_kv else kv_heads, global_dim
    if not isinstance(by_layer, Mapping) or not all(re.fullmatch(r"[0-9]{1,5}", str(layer)) for layer in by_layer):
        raise fields.error(f"per_layer_config is {by_layer!r}, an object of layers was expected", "per_layer_config")
    said = {int(layer): values for layer, values in by_layer.items()}
    widths = set()
    for layer, kind in enumerate(types):
        own = said.pop(layer, {})
        inner = Fields(own if isinstance(own, Mapping) else {}, f"{fields.source}, per_layer_config of layer {layer}")
        width = inner.size("num_key_value_heads", kv_heads), inner.size("head_dim", head_dim)
        inner.refuse_unknown()
        if kind == FULL:
            widths.add(width)
        elif width != (kv_heads, head_dim):
            raise inner.error("layers with a window have other widths, which is not supported")
    if said or len(widths) > 1:
        problem = f"layers that are not there: {sorted(said)}" if said else "layers without a window that differ"
        raise fields.error(f"per_layer_config has {problem}, which is not supported", "per_layer_config")
    return widths.pop()


def _read_rope(fields: Fields, kind: str, head_dim: int) -> RopeConfig:
    """The rotary embedding of one kind of layers; other spellings than this one mean nothing to the class."""
    every = fields.get("rope_parameters", _ROPE)
    if not isinstance(every, Mapping) or not isinstance(every.get(kind), Mapping):
        raise fields.error(f"rope_parameters is {every!r}, objects {SLIDING} and {FULL} were expected")
    inner = Fields(every[kind], f"{fields.source}, rope_parameters of {kind}")
    theta = inner.positive("rope_theta")
    rope = inner.choice("rope_type", {"default": "default", "proportional": "proportional"})
    if rope == "proportional":
        turned, factor = read_rotary_dim(inner, head_dim, 1.0), inner.positive("factor", 1.0)
        inner.refuse_unknown()
        return RopeConfig(theta, "proportional", factor, rotary_dim=turned)
    inner.refuse_unknown()
    return RopeConfig(theta)
