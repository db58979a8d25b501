"""One update of every adapter in a batch: only adapters have gradients, and each has its own optimizer.

The loss of an adapter is the mean over its own tokens. The sum over adapters is differentiated, so the gradient of one
adapter does not depend on the examples of the others. The base model's weights are an argument and never change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jax_moe_lora.arguments import number, whole
from jax_moe_lora.errors import InputError
from jax_moe_lora.models.blocks.partial_sums import total_over_rows
from jax_moe_lora.models.params import ModelParams
from jax_moe_lora.models.specs.model import ModelConfig
from jax_moe_lora.training.adapters import Params
from jax_moe_lora.training.batch import Batch
from jax_moe_lora.training.checks import check_rows
from jax_moe_lora.training.evaluation import Losses, Totals, losses_of, masked
from jax_moe_lora.training.layout import Placements, beside, step_layout
from jax_moe_lora.training.spec import AdapterSpec
from pallas_kernels.ops import Implementation
from pallas_kernels.pytrees import pytree
from pallas_kernels.varying import varying_as


@pytree
@dataclass(frozen=True)
class TrainState:
    """Everything that training changes, by adapter.

    Attributes:
      params: as `init_params` makes them.
      optimizer_states: optax's.
      updates: int32, the number of updates of each adapter.
    """

    params: dict[str, Params]
    optimizer_states: dict[str, Any]
    updates: dict[str, Int[Array, ""]]


@pytree
@dataclass(frozen=True)
class Metrics:
    """The figures of a step, by slot.

    Attributes:
      losses: before the update.
      gradient_norm: float32 `[S]`, before clipping.
      updated: bool `[S]`, whether the adapter was updated: whether the batch had a target of it. Others are unchanged.
    """

    losses: Losses
    gradient_norm: Float[Array, "S"]
    updated: Bool[Array, "S"]


TrainStep = Callable[[TrainState, ModelParams, Batch], tuple[TrainState, Metrics]]


def init_state(
    params: Mapping[str, Params],
    optimizers: Mapping[str, optax.GradientTransformation],
    placements: Placements | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      params: adapter -> params, as `init_params` or `from_adapter` make them. The first step donates them, so they
        cannot be used afterwards.
      optimizers: adapter -> its optimizer.
      placements: on a mesh, where the params lie (`step_layout(...).placements`).
    """
    if placements is not None:
        params = {name: jax.device_put(dict(adapter), placements[name]) for name, adapter in params.items()}
    state = TrainState(
        {name: dict(adapter) for name, adapter in params.items()},
        {name: optimizers[name].init(adapter) for name, adapter in params.items()},
        {name: jnp.zeros((), jnp.int32) for name in params},
    )
    return state if placements is None else jax.device_put(state, beside(state, placements))


def make_step(
    config: ModelConfig,
    specs: Mapping[str, AdapterSpec],
    optimizers: Mapping[str, optax.GradientTransformation],
    *,
    clip: float | Mapping[str, float] | None = None,
    router_loss: float = 0.0,
    micro_batches: int = 1,
    remat: bool = False,
    implementation: Implementation | None = None,
    mesh: str | Mesh | None = None,
) -> TrainStep:
    """The jitted `step(state, model_params, batch) -> (state, metrics)`, which donates the state.

    An adapter that has no target in the batch is left bit-for-bit unchanged, optimizer state included. Batches of one
    shape share one program.

    Args:
      config: the model's.
      specs: adapter -> what it trains; the first is slot 0.
      optimizers: adapter -> its optax optimizer, schedule included.
      clip: the largest norm of an adapter's gradient, one for all adapters or by adapter; None clips nothing.
      router_loss: coefficient of the router's auxiliary loss, over each adapter's own tokens; 0 is off.
      micro_batches: parts of a batch that are computed one after the other. The gradient is that of the mean over the
        whole batch. The router's loss is the mean over parts, weighted by each part's share of the adapter's tokens.
      remat: compute gate and up again in the backward pass: less memory (2 P F per layer), more time.
      implementation: a backend by name, or None for the best that is available.
      mesh: the devices that the model and the state are split over, as `Model.from_pretrained` takes them; None for the
        default device. Its `data` axis has some of the rows of each micro-batch in each part.

    Raises:
      InputError: a spec that the model cannot train, optimizers for other adapters, a number out of range, or a mesh
        that does not divide the model; when a batch is traced, rows that `micro_batches` and `data` do not divide.
    """
    _check_names(specs, optimizers, clip)
    layout = step_layout(config, specs, mesh)
    micro_batches = whole("micro_batches", micro_batches, 1)
    router_loss = number("router_loss", router_loss, lambda value: 0 <= value < float("inf"), "zero or more")
    clips = {name: _clipping(clip.get(name) if isinstance(clip, Mapping) else clip) for name in specs}
    evaluate, several = losses_of(layout, specs, router_loss > 0, implementation, remat), micro_batches > 1
    gradients_of = layout.per_device(
        partial(_gradients, _loss_of(evaluate, router_loss), several), (layout.adapters, P()), in_parts=several
    )

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, model: ModelParams, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = masked(batch)
        totals = Totals.of(batch, len(specs))
        parts = _split(batch, micro_batches, layout.row_multiple)
        gradients, losses = gradients_of(state.params, model, parts, totals)
        updated = totals.weight > 0
        new = {
            name: _update(
                optimizers[name], clips[name], _AdapterState.select(state, name), gradients[name], updated[slot]
            )
            for slot, name in enumerate(specs)
        }
        norms = jnp.stack([optax.tree.norm(gradients[name]) for name in specs])
        return layout.keep(_AdapterState.join(new)), Metrics(losses, norms, updated)

    return step


def _loss_of(evaluate: Callable[..., Losses], router_loss: float) -> Callable[..., tuple[Array, Losses]]:
    """What is differentiated: a part's share of the sum over all adapters, and its losses beside it."""

    def loss(params: Mapping[str, Params], model: ModelParams, part: Batch, whole_batch: Totals):
        losses = evaluate(params, model, part, whole_batch)
        return (losses.loss + router_loss * losses.router).sum(), losses

    return loss


def _check_names(specs: Mapping[str, Any], optimizers: Mapping[str, Any], clip: Any) -> None:
    if {*optimizers} != {*specs}:
        raise InputError(f"optimizers are for {_names(optimizers)}; expected one for each of {_names(specs)}.")
    if isinstance(clip, Mapping) and not {*clip} <= {*specs}:
        raise InputError(f"clip is for {_names(clip)}; expected some of {_names(specs)}.")


def _gradients(
    loss: Callable[..., tuple[Array, Losses]],
    several: bool,
    params: dict[str, Params],
    model: ModelParams,
    batch: Batch,
    totals: Totals,
) -> tuple[dict[str, Params], Losses]:
    """Gradients of the whole batch with respect to the params, and its losses; `several` parts one after the other."""
    gradient_of = jax.grad(loss, has_aux=True)
    # Each device's gradients are those of its own rows until all parts are done: one sum over rows in a step.
    params = jax.tree.map(lambda matrix: varying_as(matrix, batch.tokens), params)
    if not several:
        gradients, losses = gradient_of(params, model, batch, totals)
        return total_over_rows(gradients), losses

    def accumulate(sum_before: dict[str, Params], part: Batch) -> tuple[dict[str, Params], Losses]:
        gradients, losses = gradient_of(params, model, part, totals)
        return jax.tree.map(jnp.add, sum_before, gradients), losses

    zeros = jax.tree.map(lambda matrix: varying_as(jnp.zeros_like(matrix), matrix), params)
    gradients, parts = lax.scan(accumulate, zeros, batch)
    return total_over_rows(gradients), jax.tree.map(lambda part: part.sum(axis=0), parts)


class _AdapterState(NamedTuple):
    """One adapter's part of the state."""

    params: Params
    optimizer_state: Any
    updates: Int[Array, ""]

    @classmethod
    def select(cls, state: TrainState, name: str) -> "_AdapterState":
        return cls(state.params[name], state.optimizer_states[name], state.updates[name])

    @staticmethod
    def join(parts: Mapping[str, "_AdapterState"]) -> TrainState:
        return TrainState(
            {name: part.params for name, part in parts.items()},
            {name: part.optimizer_state for name, part in parts.items()},
            {name: part.updates for name, part in parts.items()},
        )


def _update(
    optimizer: optax.GradientTransformation,
    clip: optax.GradientTransformation,
    old: _AdapterState,
    gradient: Params,
    present: Bool[Array, ""],
) -> _AdapterState:
    """The adapter after one update, or unchanged."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes a step count with float32
        clipped, _ = clip.update(gradient, clip.init(gradient))
        updates, optimizer_state = optimizer.update(clipped, old.optimizer_state, old.params)
        new = _AdapterState(optax.apply_updates(old.params, updates), optimizer_state, old.updates + 1)
    return jax.tree.map(lambda new, old: jnp.where(present, new, old), new, old)


def _split(batch: Batch, parts: int, multiple: int) -> Batch:
    """The parts of a batch, one behind the other; the batch itself where it is one."""
    rows = batch.tokens.shape[0]
    if rows % parts:
        raise InputError(f"A batch has {rows} rows, which {parts} micro_batches do not divide; give a multiple.")
    check_rows(rows // parts, multiple)
    return (
        batch
        if parts == 1
        else jax.tree.map(lambda values: values.reshape(parts, rows // parts, *values.shape[1:]), batch)
    )


def _clipping(clip: float | None) -> optax.GradientTransformation:
    if clip is None:
        return optax.identity()
    return optax.clip_by_global_norm(number("clip", clip, lambda norm: 0 < norm < float("inf"), "a number above zero"))


def _names(adapters: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, adapters)) or "none"
