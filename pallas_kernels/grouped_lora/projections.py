"""Page gradients of several projections by a function for one, for backends that do not share work between them."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.pages import LayerPages
from pallas_kernels.plan.api import RoutingPlan


def each_projection(
    gradients: Callable[..., tuple[Array, Array]],
    x: Float[Array, "Q in"],
    dys: tuple[Float[Array, "Q _out"], ...],
    adapters: LayerPages,
    plan: RoutingPlan,
    share: Float[Array, "Q"] | None,
    shrunk: Any = None,
) -> list[tuple[Array, Array] | None]:
    """What `api.page_gradients` promises, projection by projection.

    Args:
      gradients: `gradients(x, dy, pages, plan, share)`, of one projection.
      x: as in `api.page_gradients`.
      dys: as there.
      adapters: as there.
      plan: as there.
      share: as there.
      shrunk: not used: these backends multiply A and B in one go.
    """
    del shrunk
    return [
        None if pages is None else gradients(x, dy, pages, plan, share)
        for dy, pages in zip(dys, adapters.projections, strict=True)
    ]
