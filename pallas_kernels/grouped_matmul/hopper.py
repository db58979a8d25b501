"""The Hopper backend's host side: gathers rows, lists the adapters' steps, runs shrink and matmul."""

from functools import partial

from jaxtyping import Array, Float

from pallas_kernels.activations import Activation, gated_unit
from pallas_kernels.dispatch.hopper import dispatch
from pallas_kernels.errors import InputError, UnsupportedImplementation
from pallas_kernels.grouped_lora.hopper_shrink import shrink_adapters
from pallas_kernels.grouped_matmul import hopper_kernel, hopper_quantised_kernel, xla
from pallas_kernels.grouped_matmul.biases import Biases
from pallas_kernels.grouped_matmul.hopper_kernel import MatmulOperands
from pallas_kernels.hopper import quantised_tuning
from pallas_kernels.hopper.quantised_tuning import QuantisedConfig, rows_per_tile
from pallas_kernels.hopper.tuned_file import config_for
from pallas_kernels.hopper.tuning import HopperConfig, MatmulShape, why_not
from pallas_kernels.lora_steps.api import LoRASteps, Shrunk, make_lora_steps
from pallas_kernels.lora_steps.hopper import layout_of
from pallas_kernels.pages import LayerPages
from pallas_kernels.plan.api import RoutingPlan
from pallas_kernels.plan.tiles import Tiles, cut_groups
from pallas_kernels.quantised.array import Quantised, Weights


def grouped_matmul(
    x: Float[Array, "M in"],
    weights: tuple[Float[Array, "E _out _in"] | Quantised, ...],
    plan: RoutingPlan,
    *,
    of_tokens: bool,
    biases: Biases,
    adapters: LayerPages,
    steps: LoRASteps | Shrunk | None,
    activation: Activation,
    config: HopperConfig | QuantisedConfig | None = None,
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
    num_sms, num_rows = None if config is None else config.num_sms, plan.order.shape[0]
    token_tiles = plan.token_tiles if of_tokens else None
    rows = dispatch(x, plan.position, num_rows, num_sms) if of_tokens and token_tiles is None else x
    unit = partial(gated_unit, activation) if len(weights) == 2 else None
    cut: HopperConfig | QuantisedConfig
    packed = _quantised(weights)
    if config is not None and packed != isinstance(config, QuantisedConfig):
        kind = "QuantisedConfig" if packed else "HopperConfig"
        raise InputError(f"Got a {type(config).__name__}; expected a {kind} for these weights.")
    if packed:
        cut, tiles = _cut_quantised(weights, plan, config, adapters)  # type: ignore[arg-type]
    else:
        cut, tiles = _cut(weights, plan, config)  # type: ignore[arg-type]
    source = _source(rows, weights, adapters, plan, token_tiles or tiles, steps, cut.num_sms)
    of_one_tile = None if token_tiles is None else num_rows
    if isinstance(cut, QuantisedConfig):
        return hopper_quantised_kernel.grouped_matmul(source, tiles, cut, unit, biases, num_rows=of_one_tile)
    return hopper_kernel.grouped_matmul((source,), tiles, cut, unit, biases, num_rows=of_one_tile)[0]


def gated_products(
    x: Float[Array, "Q in"],
    weights: tuple[Float[Array, "E out in"] | Quantised, ...],
    plan: RoutingPlan,
    *,
    biases: Biases,
    adapters: LayerPages,
    steps: LoRASteps | Shrunk | None,
    activation: Activation,
    config: HopperConfig | None = None,
) -> tuple[Float[Array, "Q out"], ...]:
    """What `api.gated_products` promises; the kernel writes both factors beside the gated product.

    Packed weights serve the forward pass alone: here and in `input_gradient` they are dequantised by XLA's tile loop.
    """
    if _quantised(weights):
        return xla.gated_products(
            x, weights, plan, biases=biases, adapters=adapters, steps=steps, activation=activation
        )
    cut, tiles = _cut(weights, plan, config)
    source = _source(x, weights, adapters, plan, tiles, steps, cut.num_sms)
    return hopper_kernel.grouped_matmul((source,), tiles, cut, partial(gated_unit, activation), biases, keep=True)


def input_gradient(
    dys: tuple[Float[Array, "Q _out"], ...],
    weights: tuple[Float[Array, "E out in"] | Quantised, ...],
    plan: RoutingPlan,
    *,
    adapters: LayerPages,
    shrunk: tuple[Shrunk | None, ...],
    config: HopperConfig | None = None,
) -> Float[Array, "Q in"]:
    """What `api.input_gradient` promises, by the Hopper kernels."""
    if _quantised(weights):
        return xla.input_gradient(dys, weights, plan, adapters=adapters, shrunk=shrunk)
    cut, tiles = _cut(weights, plan, config)
    sources = [
        _source(dy, (weight,), adapters.select(place.module).transposed(), plan, tiles, given, cut.num_sms)
        for dy, weight, place, given in zip(dys, weights, adapters.places, shrunk, strict=True)
    ]
    return hopper_kernel.grouped_matmul(tuple(sources), tiles, cut, transposed=True)[0]


def _quantised(weights: tuple[Weights, ...]) -> bool:
    """Whether one of them is packed words."""
    return any(isinstance(weight, Quantised) for weight in weights)


def _cut(weights: tuple[Weights, ...], plan: RoutingPlan, config: HopperConfig | None) -> tuple[HopperConfig, Tiles]:
    """How a call over 16-bit weights is cut, and the tiles that it takes."""
    if config is not None and (reason := why_not(config)):
        raise InputError(f"The Hopper kernels cannot be cut like this: {reason}.")
    arrays = tuple(weight for weight in weights if not isinstance(weight, Quantised))
    config = config or config_for(MatmulShape.from_weights(arrays, plan.position.shape[0]), plan.tiles.size)
    return config, _tiles(plan, config.tile_rows)


def _cut_quantised(
    weights: tuple[Weights, ...], plan: RoutingPlan, config: QuantisedConfig | None, adapters: LayerPages
) -> tuple[QuantisedConfig, Tiles]:
    """The same over packed weights.

    Raises:
      UnsupportedImplementation: they have two formats.
      InputError: the given config is none for these weights.
    """
    first, *others = (weight.format if isinstance(weight, Quantised) else None for weight in weights)
    if first is None or any(form != first for form in others):
        names = " and ".join(form.name if form else "16 bits" for form in (first, *others))
        raise UnsupportedImplementation(f"Gate and up are in {names}; the Hopper kernels want one format for both.")
    experts, _, columns = weights[0].shape
    if config is not None and (reason := quantised_tuning.why_not(config, columns, first)):
        raise InputError(f"The Hopper kernels cannot be cut like this: {reason}.")
    pairs, rows = plan.position.shape[0], rows_per_tile(plan.tiles.size, first)
    config = config or quantised_tuning.heuristic(pairs, experts, rows, columns, first, bool(adapters.modules))
    return config, _tiles(plan, config.tile_rows)


def _tiles(plan: RoutingPlan, rows: int) -> Tiles:
    """The plan's tiles, or its rows cut into tiles of another size."""
    if plan.tiles.size == rows:
        return plan.tiles
    if plan.token_tiles is not None:
        raise InputError(f"Every tile of this plan has all tokens, in {plan.tiles.size} rows; got a config of {rows}.")
    return cut_groups(plan.group_sizes, plan.group_starts, plan.position.shape[0], rows)


def _source(
    rows: Array,
    weights: tuple[Weights, ...],
    adapters: LayerPages,
    plan: RoutingPlan,
    tiles: Tiles,
    steps: LoRASteps | Shrunk | None,
    num_sms: int,
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
    hidden = shrink_adapters(rows, adapters, tiles, lists, num_sms).hidden
    return MatmulOperands(rows, weights, lists, hidden, pools_of_b)
