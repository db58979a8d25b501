"""The portable backend's host side: gathers rows, lists the adapters' steps, runs shrink and matmul."""

from functools import partial

from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, gated_unit
from pallas_kernels.backend import UnsupportedImplementation
from pallas_kernels.grouped_lora import portable_shrink
from pallas_kernels.grouped_matmul import portable_kernel
from pallas_kernels.lora_steps.api import Adapters, with_nothing
from pallas_kernels.lora_steps.xla import make_packed_steps
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.portable.tuning import TILE_ROWS, Config, heuristic


def reads(plan: RoutingPlan) -> bool:
    """Whether the kernels can read the plan: its tiles are whole, and as large as they have them."""
    return plan.tiles.size in TILE_ROWS and plan.alignment % plan.tiles.size == 0


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: tuple[Float[Array, "E out in"], ...],
    plan: RoutingPlan,
    of_tokens: bool,
    adapters: Adapters,
    activation: Activation,
    config: Config | None = None,
    biases: tuple[Float[Array, "E out"] | None, ...] = (None, None),
) -> Float[Array, "Q out"]:
    """What `api.grouped_matmul` promises, by the portable kernels. `config`: how to cut; the heuristic's if None.

    Raises:
      UnsupportedImplementation: for a plan that was made for another backend.
    """
    if not reads(plan):
        raise UnsupportedImplementation(
            f"The plan aligns experts to {plan.alignment} rows and has tiles of {plan.tiles.size}, portable needs "
            f"both to be {' or '.join(map(str, TILE_ROWS))}; give make_plan implementation='portable'."
        )
    config = config or heuristic(plan.tiles.size, len(weights), weights[0].shape[1])
    rows = x[plan.token] if of_tokens else x
    unit = partial(gated_unit, activation) if len(weights) == 2 else None
    if all(pages is None for pages in adapters):
        return portable_kernel.grouped_matmul(rows, weights, plan.tiles, config, unit, biases=biases)
    pages = with_nothing(adapters)
    steps = make_packed_steps(plan, plan.tiles, pages)
    pools = (pages[0].a,) if pages[0].a is pages[-1].a else (pages[0].a, pages[-1].a)
    hidden = portable_shrink.shrink(rows, pools, plan.tiles, steps)
    return portable_kernel.grouped_matmul(
        rows, weights, plan.tiles, config, unit, steps, hidden, tuple(own.b for own in pages), biases
    )
