"""The Hopper backend's host side: gathers rows, lists the adapters' steps, runs shrink and matmul."""

from functools import partial

from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, gated_unit
from pallas_kernels.dispatch.hopper import dispatch
from pallas_kernels.errors import InputError
from pallas_kernels.grouped_lora.hopper_shrink import shrink_adapters
from pallas_kernels.grouped_matmul import hopper_kernel
from pallas_kernels.grouped_matmul.biases import Biases
from pallas_kernels.grouped_matmul.hopper_kernel import MatmulOperands
from pallas_kernels.hopper.tuned_file import config_for
from pallas_kernels.hopper.tuning import HopperConfig, MatmulShape, why_not
from pallas_kernels.lora_steps.api import LoRASteps, Shrunk, make_lora_steps
from pallas_kernels.lora_steps.hopper import layout_of
from pallas_kernels.pages import LayerPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.plan.tiles import Tiles, cut_groups


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: tuple[Float[Array, "E _out _in"], ...],
    plan: RoutingPlan,
    *,
    of_tokens: bool,
    biases: Biases,
    adapters: LayerPages,
    steps: LoRASteps | Shrunk | None,
    activation: Activation,
    config: HopperConfig | None = None,
) -> Float[Array, "Q out"]:
    """What `api.grouped_matmul` promises, by the Hopper kernels.

    Args:
      x: as in `api.grouped_matmul`.
      weights: one weight, or a pair.
      plan: as in `api.grouped_matmul`.
      of_tokens: as there.
      biases: for each weight its bias, or None.
      adapters: for each weight its pages.
      steps: as there.
      activation: as there.
      config: how to cut; `tuned_file.config_for`'s where None.
    """
    config, tiles = _cut(weights, plan, config)
    rows = dispatch(x, plan.position, plan.order.shape[0], config.num_sms) if of_tokens else x
    unit = partial(gated_unit, activation) if len(weights) == 2 else None
    source = _source(rows, weights, adapters, plan, tiles, steps, config)
    return hopper_kernel.grouped_matmul((source,), tiles, config, unit, biases)[0]


def gated_products(
    x: Float[Array, "Q in"],
    weights: tuple[Float[Array, "E out in"], ...],
    plan: RoutingPlan,
    *,
    biases: Biases,
    adapters: LayerPages,
    steps: LoRASteps | Shrunk | None,
    activation: Activation,
    config: HopperConfig | None = None,
) -> tuple[Float[Array, "Q out"], ...]:
    """What `api.gated_products` promises; the kernel writes both factors beside the gated product."""
    config, tiles = _cut(weights, plan, config)
    source = _source(x, weights, adapters, plan, tiles, steps, config)
    return hopper_kernel.grouped_matmul((source,), tiles, config, partial(gated_unit, activation), biases, keep=True)


def input_gradient(
    dys: tuple[Float[Array, "Q _out"], ...],
    weights: tuple[Float[Array, "E out in"], ...],
    plan: RoutingPlan,
    *,
    adapters: LayerPages,
    shrunk: tuple[Shrunk | None, ...],
    config: HopperConfig | None = None,
) -> Float[Array, "Q in"]:
    """What `api.input_gradient` promises, by the Hopper kernels."""
    config, tiles = _cut(weights, plan, config)
    sources = [
        _source(dy, (weight,), adapters.select(place.module).transposed(), plan, tiles, given, config)
        for dy, weight, place, given in zip(dys, weights, adapters.places, shrunk, strict=True)
    ]
    return hopper_kernel.grouped_matmul(tuple(sources), tiles, config, transposed=True)[0]


def _cut(weights: tuple[Array, ...], plan: RoutingPlan, config: HopperConfig | None) -> tuple[HopperConfig, Tiles]:
    """How the call is cut, and the tiles that it takes: the plan's, where they have the size."""
    if config is not None and (reason := why_not(config)):
        raise InputError(f"The Hopper kernels cannot be cut like this: {reason}.")
    pairs = plan.position.shape[0]
    config = config or config_for(MatmulShape.from_weights(weights, pairs), plan.tiles.size)
    if plan.tiles.size == config.tile_rows:
        return config, plan.tiles
    return config, cut_groups(plan.group_sizes, plan.group_starts, pairs, config.tile_rows)


def _source(
    rows: Array,
    weights: tuple[Array, ...],
    adapters: LayerPages,
    plan: RoutingPlan,
    tiles: Tiles,
    steps: LoRASteps | Shrunk | None,
    config: HopperConfig,
) -> MatmulOperands:
    """The product and its adapters' expand; steps that are not given, or were made for other tiles, are made here."""
    if not adapters.modules:
        return MatmulOperands(rows, weights)
    lists = steps.steps if isinstance(steps, Shrunk) else steps
    if lists is None or lists.tile_rows != tiles.size:
        (lists,) = make_lora_steps(plan, (adapters,), tiles)
        assert lists is not None
        steps = None
    pages = adapters.pad_with_empty_pages()
    pools_of_b = tuple(pages.pools[place.b] for place in pages.places)
    if isinstance(steps, Shrunk):
        return MatmulOperands(rows, weights, lists, steps.hidden, pools_of_b)
    if lists.layout != (wanted := layout_of(plan, pages, tiles.size)):
        raise InputError(
            f"steps were made for other adapters ({lists.layout}) than these ({wanted}); see make_lora_steps."
        )
    hidden = shrink_adapters(rows, adapters, tiles, lists, config.num_sms).hidden
    return MatmulOperands(rows, weights, lists, hidden, pools_of_b)
