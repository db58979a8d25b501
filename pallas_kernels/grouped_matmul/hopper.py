"""The Hopper backend's host side: gathers rows, lists the adapters' steps, runs shrink and matmul."""

from functools import partial

from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, gated_unit
from pallas_kernels.backend import UnsupportedImplementation
from pallas_kernels.dispatch.api import dispatch
from pallas_kernels.grouped_lora.hopper_shrink import shrink_adapters
from pallas_kernels.grouped_matmul import hopper_kernel
from pallas_kernels.grouped_matmul.hopper_kernel import Source
from pallas_kernels.hopper import ring
from pallas_kernels.hopper.tuning import Config, Matmul, config_for, why_not
from pallas_kernels.lora_steps.api import Adapters, LoRASteps, Shrunk, make_steps, steps_of, with_nothing
from pallas_kernels.plan.api import RoutingPlan, Tiles, cut_groups

Biases = tuple[Float[Array, "E _out"] | None, ...]


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: tuple[Float[Array, "E _out _in"], ...],
    plan: RoutingPlan,
    of_tokens: bool,
    adapters: Adapters,
    activation: Activation,
    steps: LoRASteps | Shrunk | None = None,
    config: Config | None = None,
    biases: Biases = (None, None),
    keep: bool = False,
) -> tuple[Float[Array, "Q out"], ...]:
    """What `api.grouped_matmul` promises, by the Hopper kernels, and with `keep` both factors of a gated product.

    Args:
      config: `tuning.config_for`'s where None.
    """
    config, tiles = _cut(weights, plan, config)
    rows = dispatch(x, plan.position, plan.order.shape[0], config.num_sms) if of_tokens else x
    unit = partial(gated_unit, activation) if len(weights) == 2 else None
    source = _source(rows, weights, adapters, plan, tiles, steps, config)
    return hopper_kernel.grouped_matmul((source,), tiles, config, unit, biases, keep=keep)


def input_gradient(
    dys: tuple[Float[Array, "Q _out"], ...],
    weights: tuple[Float[Array, "E out in"], ...],
    plan: RoutingPlan,
    adapters: Adapters,
    shrunk: tuple[Shrunk | None, ...],
    config: Config | None = None,
) -> Float[Array, "Q in"]:
    """What `api.input_gradient` promises, by the Hopper kernels."""
    config, tiles = _cut(weights, plan, config)
    sources = [
        _source(dy, (weight,), (pages and pages.transposed(),), plan, tiles, own, config)
        for dy, weight, pages, own in zip(dys, weights, adapters, shrunk, strict=True)
    ]
    return hopper_kernel.grouped_matmul(tuple(sources), tiles, config, transposed=True)[0]


def _cut(weights: tuple[Array, ...], plan: RoutingPlan, config: Config | None) -> tuple[Config, Tiles]:
    """How the call is cut, and the tiles that it takes: the plan's, where they have the size."""
    if plan.alignment % ring.ROW_ALIGNMENT:
        raise UnsupportedImplementation(
            f"The plan aligns experts to {plan.alignment} rows, hopper needs {ring.ROW_ALIGNMENT}; "
            "give make_plan implementation='hopper'."
        )
    if config is not None and (reason := why_not(config)):
        raise ValueError(f"The Hopper kernels cannot be cut like this: {reason}.")
    pairs = plan.position.shape[0]
    config = config or config_for(Matmul.of(weights, pairs), plan.tiles.size)
    if plan.tiles.size == config.tile_rows:
        return config, plan.tiles
    return config, cut_groups(plan.group_sizes, plan.group_starts, pairs, config.tile_rows)


def _source(
    rows: Array,
    weights: tuple[Array, ...],
    adapters: Adapters,
    plan: RoutingPlan,
    tiles: Tiles,
    steps: LoRASteps | Shrunk | None,
    config: Config,
) -> Source:
    """The product and its adapters' expand; what is not given of the steps, or for other tiles, is made."""
    if all(pages is None for pages in adapters):
        return Source(rows, weights)
    lists = steps.steps if isinstance(steps, Shrunk) else steps
    if lists is None or lists.tile_rows != tiles.size:
        (lists,) = make_steps(plan, (adapters,), tiles)
        assert lists is not None
        steps = None
    pages = with_nothing(adapters)
    pools_b = tuple(own.b for own in pages)
    if isinstance(steps, Shrunk):
        return Source(rows, weights, lists, steps.hidden, pools_b)
    if lists.of != (wanted := steps_of(plan, pages, tiles.size)):
        raise ValueError(f"steps were made for other adapters ({lists.of}) than these ({wanted}); see lora_steps.")
    return Source(rows, weights, lists, shrink_adapters(rows, adapters, tiles, lists, config.num_sms).hidden, pools_b)
