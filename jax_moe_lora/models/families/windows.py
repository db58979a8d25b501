"""Which layers of a family see a window, and which see everything."""

from collections.abc import Callable

from jax_moe_lora.models.decoder_config import read_layers
from jax_moe_lora.models.fields import Fields

SLIDING, FULL = "sliding_attention", "full_attention"


def read_windows(fields: Fields, by_default: Callable[[int], bool]) -> tuple[int | None, ...]:
    """The window of each layer, by `layer_types` and `sliding_window`; None for a layer that sees everything.

    Args:
      fields: the config's.
      by_default: of a layer's number, whether it has a window in a config without `layer_types`.

    Raises:
      ConfigError: `layer_types` of another length or kind, or a layer with a window and no `sliding_window`.
    """
    count, types = read_layers(fields), fields.get("layer_types")
    if types is None:
        types = [SLIDING if by_default(layer) else FULL for layer in range(count)]
    if not isinstance(types, list) or len(types) != count or any(kind not in (SLIDING, FULL) for kind in types):
        raise fields.error(f"layer_types is {types!r}, {count} of {SLIDING} and {FULL} were expected", "layer_types")
    window = fields.size("sliding_window") if SLIDING in types else fields.optional_size("sliding_window")
    return tuple(window if kind == SLIDING else None for kind in types)
