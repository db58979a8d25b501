"""The Hopper backend's host side: gathers rows, lists the adapters' steps, runs shrink and matmul."""

from jaxtyping import Array, Float

from pallas_kernels import mosaic
from pallas_kernels.activations import ACTIVATIONS, Activation
from pallas_kernels.backend import UnsupportedImplementation
from pallas_kernels.dispatch import dispatch
from pallas_kernels.grouped_lora import hopper as lora
from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.plan import RoutingPlan, cut_groups
from pallas_kernels.steps import Adapters, LoRASteps, make_steps, steps_of, with_nothing
from pallas_kernels.tuning import Config, Matmul, config_for


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: tuple[Float[Array, "E _out _in"], ...],
    plan: RoutingPlan,
    of_tokens: bool,
    adapters: Adapters,
    activation: Activation,
    steps: LoRASteps | None = None,
    config: Config | None = None,
    transposed: bool = False,
) -> Float[Array, "Q out"]:
    """What `api.grouped_matmul` promises, by the Hopper kernels. `config`: `tuning.config_for`'s where None."""
    if plan.alignment % mosaic.ROW_ALIGNMENT:
        raise UnsupportedImplementation(
            f"The plan aligns experts to {plan.alignment} rows, hopper needs {mosaic.ROW_ALIGNMENT}; "
            "give make_plan implementation='hopper'."
        )
    pairs = plan.position.shape[0]
    config = config or config_for(Matmul.of(weights, pairs), plan.tiles.size)
    tiles = plan.tiles
    if tiles.size != config.tile_rows:
        tiles = cut_groups(plan.group_sizes, plan.group_starts, pairs, config.tile_rows)
    rows = dispatch(x, plan.position, plan.order.shape[0], config.num_sms) if of_tokens else x
    unit = ACTIVATIONS[activation] if len(weights) == 2 else None
    if all(pages is None for pages in adapters):
        return hopper.grouped_matmul(rows, weights, tiles, config, unit, transposed=transposed)
    if steps is None or steps.tile_rows != tiles.size:
        (steps,) = make_steps(plan, (adapters,), tiles)
        assert steps is not None
    pages = with_nothing(adapters)
    if steps.of != (wanted := steps_of(plan, pages, tiles.size)):
        raise ValueError(f"steps were made for other adapters ({steps.of}) than these ({wanted}); see lora_steps.")
    pools = (pages[0].a,) if pages[0].a is pages[-1].a else (pages[0].a, pages[-1].a)
    hidden = lora.shrink(rows, pools, tiles, steps, config.num_sms)
    pools_b = tuple(own.b for own in pages)
    return hopper.grouped_matmul(rows, weights, tiles, config, unit, steps, hidden, pools_b, transposed)
