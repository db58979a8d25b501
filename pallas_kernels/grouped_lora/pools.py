"""The pools of A that a shrink reads."""

from jaxtyping import Array, Float

from pallas_kernels.pages import LayerPages


def pools_of_a(adapters: LayerPages) -> tuple[Float[Array, "_pages 16 in"], ...]:
    """The pool of A pages of one projection or of two, once where they share it."""
    places = adapters.pad_with_empty_pages().places
    names = dict.fromkeys((places[0].a, places[-1].a))
    return tuple(adapters.pools[name] for name in names)
