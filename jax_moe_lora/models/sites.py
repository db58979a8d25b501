"""The projections of a decoder that adapters may target."""

from collections.abc import Sequence
from typing import Literal

from jax_moe_lora.adapters.lora import Site
from jax_moe_lora.arguments import sequence
from jax_moe_lora.errors import InputError
from jax_moe_lora.models.specs.model import ModelConfig, layer_parameters

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
    shapes: dict[str, tuple[int, ...]] = {}
    layers: dict[str, list[int]] = {}
    for index, spec in enumerate(config.layers):
        for row in layer_parameters(spec, config.hidden_size):
            if row.projection:
                assert shapes.setdefault(row.name, row.shape) == row.shape, f"{row.name} has two shapes"
                layers.setdefault(row.name, []).append(index)
    return {
        module: Site(shape[-1], shape[-2], shape[0] if len(shape) == 3 else 1, tuple(layers[module]))
        for module, shape in shapes.items()
    }
