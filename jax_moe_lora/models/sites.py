"""The projections of a decoder that adapters may target."""

from collections.abc import Sequence
from typing import Literal

from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.arguments import sequence
from jax_moe_lora.config import ModelConfig
from jax_moe_lora.errors import InputError

ALL = "all"


def adapter_sites(config: ModelConfig) -> dict[str, Site]:
    """Every projection that a served adapter may target: those of the layers, the embedding and the head.

    Returns:
      Module -> its widths, and the layers that have it. `embedding` and `head` are in none: they stand in layer L,
      behind the last one.
    """
    outside, v = (config.num_layers,), config.vocab_size
    embedding, head = Site(v, config.hidden_size, 1, outside), Site(config.hidden_size, v, 1, outside)
    return layer_sites(config) | {"embedding": embedding, "head": head}


def select_sites(config: ModelConfig, modules: Sequence[str] | Literal["all"] | None) -> dict[str, Site]:
    """The sites that a model is loaded with room for.

    Args:
      config: the model.
      modules: their names; "all" of `adapter_sites`; or None for `layer_sites`.

    Returns:
      Module -> its widths, and the layers that have it.

    Raises:
      InputError: the model has no module of a name, or there are no names.
    """
    if modules is None:
        return layer_sites(config)
    sites = adapter_sites(config)
    if isinstance(modules, str):
        if modules != ALL:
            raise InputError(f"adapter_targets is {modules!r}; expected {ALL!r}, or a list of modules.")
        return sites
    names = sequence("adapter_targets", modules)
    if unknown := [name for name in names if name not in sites]:
        raise InputError(f"adapter_targets name {unknown[0]!r}; this model has {', '.join(sites)}.")
    if not names:
        raise InputError(f"adapter_targets are empty; name some of {', '.join(sites)}, or give None for the layers'.")
    return {module: site for module, site in sites.items() if module in names}


def layer_sites(config: ModelConfig) -> dict[str, Site]:
    """The projections of the decoder's layers, which are those that can be trained.

    Returns:
      Module -> its widths, and the layers that have it.
    """
    every = tuple(range(config.num_layers))
    routed = tuple(layer for layer in every if config.moe_layers[layer])
    dense = tuple(layer for layer in every if not config.moe_layers[layer])
    d, f, e = config.hidden_size, config.moe.expert_width, config.moe.num_experts
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sites = {
        "q": Site(d, queries, 1, every),
        "k": Site(d, keys, 1, every),
        "v": Site(d, keys, 1, every),
        "o": Site(queries, d, 1, every),
        "router": Site(d, e, 1, routed),
        "gate": Site(d, f, e, routed),
        "up": Site(d, f, e, routed),
        "down": Site(f, d, e, routed),
        **_mlp_sites("mlp", d, config.mlp_width, dense),
    }
    if shared := config.shared_expert_width:
        sites |= _mlp_sites("shared", d, shared, routed) | {"shared_expert_gate": Site(d, 1, 1, routed)}
    return {module: site for module, site in sites.items() if site.layers}


def _mlp_sites(prefix: str, hidden: int, width: int, layers: tuple[int, ...]) -> dict[str, Site]:
    into, out_of = Site(hidden, width, 1, layers), Site(width, hidden, 1, layers)
    return {f"{prefix}_gate": into, f"{prefix}_up": into, f"{prefix}_down": out_of}
